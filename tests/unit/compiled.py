"""Compiles what tests compile for themselves once for each content: the same sources, flags and compiler give the file
that an earlier run left below the folder where `bucketmoo_ds.ops.build` keeps the package's own libraries."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from bucketmoo_ds.ops import build

Compiled = tuple[Path, str]


def together(works: Iterable[Callable[[], Compiled]]) -> list[Compiled]:
    """Two at a time, in the order given: the slowest should come first."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda work: work(), works))


def compiled(command: Sequence[str], name: str, depends_on: Iterable[Path]) -> Compiled:
    """Runs `command -o <file>`, unless that was done before.

    Args:
        command: a compiler, its flags and sources.
        name: of the file that is made.
        depends_on: files, and folders, of which all files are read.

    Returns:
        The file, and what the compiler said.
    """
    folder = _cache() / _fingerprint(command, depends_on)
    made, report = folder / name, folder / f"{name}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    # Of two files of tests that need it, run side by side, one compiles.
    with build._locked(folder / f"{name}.lock"):
        if report.exists():
            return made, report.read_text()
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file = Path(temporary) / name
            done = subprocess.run([*command, "-o", str(file)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            os.replace(file, made)
            said = Path(temporary) / "said.txt"
            said.write_text(done.stderr)
            os.replace(said, report)  # last: it says that the file is whole
    return made, report.read_text()


def _cache() -> Path:
    given, home = os.environ.get(build.CACHE), os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(home) / "bucketmoo_ds") / "tests"


def _fingerprint(command: Sequence[str], depends_on: Iterable[Path]) -> str:
    made_of = hashlib.sha256(_version(command[0]) + repr(list(command)).encode())
    for each in depends_on:
        for path in sorted(each.rglob("*")) if each.is_dir() else [each]:
            if path.is_file():
                made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    return made_of.hexdigest()[:16]


@cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
