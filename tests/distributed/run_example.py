"""Worker: `examples/train_wrapped.py`, as torchrun starts it, with the arguments as its command line."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import worker

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import train_wrapped

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which takes a minute to compile
    sys.argv = [train_wrapped.__file__, *worker.arguments()]
    train_wrapped.main()
    worker.leave("done")
