"""Starts worker processes for the distributed tests: gloo on loopback, a time limit, and results from files.

Importing torch and DeepSpeed takes one process several seconds, and a dozen tests start up to four. So the imports are
made once, in a fork server, and every rank is a fork of it. It holds no thread and no process group, and it has not
imported bucketmoo_ds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
WORKERS = TESTS / "distributed"

# What the ranks import anyway; much of it is imported only when an engine, a model or an optimizer is first made.
PRELOAD = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.utils.cpp_extension",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "accelerate",
)
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers, which would be threads in the fork server
    "BUCKETMOO_TESTS_PRELOAD": ",".join(PRELOAD),
}


@dataclasses.dataclass
class Outcome:
    """What one rank left behind: its result (`None` where it wrote none), its output, its exit status, and how many
    seconds after the start it had ended."""

    result: Any
    output: str
    status: int | None
    seconds: float


def run(script: str, world_size: int, cases: list[dict[str, Any]], timeout: float = 150) -> list[list[Any]]:
    """Runs all cases of a worker script that uses `worker.serve`; returns, case by case, the results of all ranks.

    Raises:
        AssertionError: a rank did not get through all cases; the message holds the end of its output.
    """
    outcomes = launch(script, world_size, cases, timeout)
    for rank, outcome in enumerate(outcomes):
        done = len(outcome.result or [])
        assert done == len(cases), (
            f"{script}: rank {rank} of {world_size} ended (status {outcome.status}) after {done} of {len(cases)} "
            f"cases, next {cases[done]}\n{outcome.output[-4000:]}"
        )
    return [list(results) for results in zip(*(outcome.result for outcome in outcomes), strict=True)]


def launch(script: str, world_size: int, arguments: object, timeout: float = 150) -> list[Outcome]:
    """Runs `tests/distributed/<script>` on `world_size` ranks.

    The script finds `arguments` with `worker.arguments()` and leaves its result with `worker.leave(result)`. All ranks
    are killed at the time limit, so that a hang fails.
    """
    context = _fork_server()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        port = _free_port()
        began = time.monotonic()
        processes = [
            context.Process(target=_rank, args=(script, _environment(rank, world_size, port, folder), log), daemon=True)
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        ended = _wait(processes, began, timeout)
        return [
            Outcome(
                torch.load(path, weights_only=False) if (path := Path(folder) / f"result{rank}.pt").exists() else None,
                logs[rank].read_text(errors="replace") if logs[rank].exists() else "",
                process.exitcode,
                ended[rank],
            )
            for rank, process in enumerate(processes)
        ]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])})
    try:
        context.set_forkserver_preload([__name__])
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _environment(rank: int, world_size: int, port: int, folder: str) -> dict[str, str]:
    return (
        dict(os.environ)
        | ENVIRONMENT
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "WORKER_FOLDER": folder,
        }
    )


def _rank(script: str, environment: dict[str, str], log: Path) -> None:
    """One rank: a fork of the server, which becomes the worker script."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(stream, standard)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script]
    sys.path[:0] = [str(WORKERS), str(TESTS), str(TESTS.parent)]
    runpy.run_path(str(WORKERS / script), run_name="__main__")


def _wait(processes: list[ForkServerProcess], began: float, timeout: float) -> list[float]:
    """Waits for all processes, kills what is left at the time limit, and returns when each had ended."""
    ended: dict[int, float] = {}
    while len(ended) < len(processes):
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic() - began
        if time.monotonic() - began > timeout:
            for process in processes:
                if process.exitcode is None:
                    process.kill()
        time.sleep(0.05)
    return [ended[rank] for rank in range(len(processes))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "launch" and "BUCKETMOO_TESTS_PRELOAD" in os.environ:
    for name in os.environ["BUCKETMOO_TESTS_PRELOAD"].split(","):
        with contextlib.suppress(ModuleNotFoundError):  # another version's
            importlib.import_module(name)
    torch.set_num_threads(1)
