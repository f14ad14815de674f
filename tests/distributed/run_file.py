"""Worker: a file of Python, as torchrun starts it; leaves what an expression of the file's names is at the end."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import deepspeed
import worker


def main(file: str, words: list[str], leave: str, folder: str | None = None) -> None:
    """Args:
    file: its path.
    words: of its command line.
    leave: the expression.
    folder: where it runs.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which takes a minute to compile
    sys.argv = [file, *words]
    sys.path.insert(0, str(Path(file).parent))
    if folder:
        os.chdir(folder)
    names = runpy.run_path(file, run_name="__main__")
    worker.leave(eval(leave, names))


if __name__ == "__main__":
    main(**worker.arguments())
