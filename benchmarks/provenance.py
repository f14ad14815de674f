"""Where a result was measured: machine, versions, commit and date, for the head of every result file."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Returns the head of a result file, as plain JSON values.

    The commit is `null` outside of a git checkout; `dirty` says whether a file differed from it (result files apart).
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "deepspeed": metadata.version("deepspeed"),
            "bucketmoo_ds": _own_version(),
        },
        "commit": commit,
        "dirty": None if commit is None else bool(changed),
    }


def headline(head: dict[str, Any]) -> str:
    """Returns one line of Markdown that says where the numbers below it come from."""
    machine, versions = head["machine"], head["versions"]
    commit = "no commit" if head["commit"] is None else f"commit {head['commit'][:12]}{' + changes' * head['dirty']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine['cpu']}, {machine['cores']} cores; {packages}; {commit}; {head['date'][:10]}"


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _own_version() -> str:
    from bucketmoo_ds import __version__

    return __version__
