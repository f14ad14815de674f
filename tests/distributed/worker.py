"""What every worker script of the distributed tests shares: its arguments, its result, and DeepSpeed on the CPU."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FOLDER = Path(os.environ["WORKER_FOLDER"])
RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])


def start() -> None:
    """One thread a rank, gloo, and no compilation of DeepSpeed's shared-memory op, which takes a minute."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    deepspeed.init_distributed("gloo")


def arguments() -> Any:
    return torch.load(FOLDER / "arguments.pt", weights_only=False)


def leave(result: object) -> None:
    temporary = FOLDER / f"result{RANK}.tmp"
    torch.save(result, temporary)
    temporary.rename(FOLDER / f"result{RANK}.pt")
