"""What every worker script of the distributed tests shares: its arguments, its results, and DeepSpeed on the CPU."""

from __future__ import annotations

import datetime
import hashlib
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FOLDER = Path(os.environ["WORKER_FOLDER"])
RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])


def start() -> None:
    """One thread a rank, gloo, and no compilation of DeepSpeed's shared-memory op, which takes a minute.

    A collective that a rank waits for in vain fails after 45 seconds: before the launcher's limit, so that a test sees
    which one it was.
    """
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=45))
    deepspeed.init_distributed("gloo")


def serve(function: Callable[..., Any]) -> None:
    """Runs `function(**case)` for every case of the arguments and leaves the list of what came of them.

    An exception becomes `{"error": its type's name, "message": its text}`. All ranks must raise together, or the next
    collective ends this run.
    """
    start()
    results = []
    for case in arguments():
        try:
            results.append(function(**case))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": type(error).__name__, "message": str(error)})
        leave(results)
        dist.barrier()


def arguments() -> Any:
    return torch.load(FOLDER / "arguments.pt", weights_only=False)


def leave(result: object) -> None:
    """Leaves this rank's result; a later call replaces it."""
    temporary = FOLDER / f"result{RANK}.tmp"
    torch.save(result, temporary)
    temporary.rename(FOLDER / f"result{RANK}.pt")


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the tensors' bits."""
    data = b"".join(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(data).hexdigest()


def optimizer_state(optimizer: Any) -> list[torch.Tensor]:
    """The tensors of this rank's partition of a ZeRO optimizer: float32 parameters, and what the optimizer keeps."""
    inner = optimizer.optimizer
    kept = [
        value.reshape(-1)
        for group in inner.param_groups
        for parameter in group["params"]
        for _, value in sorted(inner.state[parameter].items())
        if isinstance(value, torch.Tensor)
    ]
    return [*optimizer.single_partition_of_fp32_groups, *kept]
