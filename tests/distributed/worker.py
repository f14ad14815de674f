"""What every worker script of the distributed tests shares: its arguments, its results, and DeepSpeed on the CPU."""

from __future__ import annotations

import datetime
import gc
import hashlib
import inspect
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
    # DeepSpeed asks for AVX-512 FP16; torch computes in fp16 on any CPU.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    mend_gathers()
    # ZeRO-3 collects garbage whenever an engine is made, and would go through all that was imported.
    gc.freeze()


def mend_gathers() -> None:
    """What plain DeepSpeed before 0.19.8 does wrong on gloo, and no test is about.

    ZeRO-3 waits for the last of several gathers, though the others may end later; the adapter refuses that. 0.18.7 to
    0.18.9 flatten parameters with autograd on, and gloo may not write into what comes of it.
    """
    import deepspeed

    gather, coalesced = deepspeed.comm.all_gather_into_tensor, deepspeed.zero.Init._allgather_params_coalesced
    if "launch_handles[-1].wait()" not in inspect.getsource(coalesced):
        return

    def at_once(whole: torch.Tensor, part: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        handle = gather(whole.data, part.data, *args, **kwargs)
        if handle is not None:
            handle.wait()
        return handle

    def mended(*args: Any, **kwargs: Any) -> None:
        coalesced(*args, **kwargs)

    deepspeed.comm.all_gather_into_tensor = at_once
    deepspeed.zero.Init._allgather_params_coalesced = mended


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


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all of a module's parameters, which ZeRO-3 has taken apart: all ranks call it."""
    import deepspeed

    parameters = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


def optimizer_state(optimizer: Any) -> list[torch.Tensor]:
    """The tensors of this rank's part of a DeepSpeed optimizer: float32 parameters, and what is kept for each."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # ZeRO-3 shows its sub-groups to the inner optimizer during a step only, and leaves their padding uninitialised.
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    parameters = flat or [parameter for group in inner.param_groups for parameter in group["params"]]
    kept = [
        value.reshape(-1)
        for parameter in parameters
        for _, value in sorted(inner.state[parameter].items())
        if isinstance(value, torch.Tensor)
    ]
    if flat is None:
        return [*parameters, *kept]
    trained = [parameter for group in optimizer.fp16_groups for parameter in group if parameter.requires_grad]
    chunks = []
    for parameter in trained:
        left = max(parameter.ds_numel - RANK * parameter.partition_numel(), 0)
        chunks.append(optimizer.get_local_fp32_param(parameter).reshape(-1)[:left])
    return [*chunks, *kept]
