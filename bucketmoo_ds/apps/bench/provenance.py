"""Where a result was measured: machine, versions, commit and date, for the head of every result file."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bucketmoo_ds import __version__

PACKAGE = Path(__file__).resolve().parents[2]


def describe(packages: Sequence[str] = ("torch", "deepspeed")) -> dict[str, Any]:
    """Returns the head of a result file, as plain JSON values.

    The commit is `null` outside of a git checkout of this package; `dirty` says whether a file differed from it (result
    files apart).

    Args:
        packages: whose versions are named, where they are installed.
    """
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "__init__.py") else None
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    gpu = _gpu_model()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.platform()}
        | ({"gpu": gpu} if gpu else {}),
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in packages if (version := _version(name))},
            "bucketmoo_ds": __version__,
        },
        "commit": commit,
        "dirty": None if commit is None else bool(changed),
    }


def headline(head: dict[str, Any]) -> str:
    """Returns one line of Markdown that says where the numbers below it come from."""
    machine, versions = head["machine"], head["versions"]
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    commit = "no commit" if head["commit"] is None else f"commit {head['commit'][:12]}{' + changes' * head['dirty']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores; {packages}; {commit}; {head['date'][:10]}"


def _cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    text = described.read_text(encoding="utf-8") if described.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _gpu_model() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str | None:
    """Returns what git prints about the package's folder; `None` where git knows nothing of it, or is not there. A
    package that is installed below somebody else's checkout, in its virtual environment, is not a file of that."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
