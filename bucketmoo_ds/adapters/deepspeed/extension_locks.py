"""Locks that a killed build of a torch extension left behind.

DeepSpeed compiles extensions through `torch.utils.cpp_extension` when it is first used, `init_distributed` on a CPU
among them. A build holds a file `lock` (torch 2.13, `torch/utils/file_baton.py`), and whoever finds one waits until it
is gone: without end and without a word where the builder was killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from bucketmoo_ds.logs import logger

# Seconds. A build that is alive rarely takes as long, and a warning about one does no harm.
OLD = 600.0


def warn_of_old_locks() -> None:
    """Warns, on the first rank, of every lock that is older than a build takes."""
    if os.environ.get("RANK", "0") == "0":
        for message in describe_old_locks():
            logger.warning(message)


def describe_old_locks() -> list[str]:
    """Returns a sentence about every old lock, with its path and what to do."""
    return [
        f"{path} is there for {age / 60:.0f} minutes: torch waits without end for the build of an extension that holds "
        "it. If that build was killed, remove the file"
        for path, age in _locks()
        if age > OLD
    ]


def _locks() -> Iterator[tuple[Path, float]]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for pattern in ("*/lock", "*/*/lock"):  # the default root has a folder for each version of Python
        for path in sorted(root.glob(pattern)):
            try:
                yield path, time.time() - path.stat().st_mtime
            except OSError:  # its builder has just removed it
                continue
