"""Starts worker processes for the distributed tests: gloo on loopback, a time limit, and results from files.

A worker is judged by what it wrote, not by its exit status: now and then one aborts at exit, in gloo's or DeepSpeed's
own clean-up, when its work is done.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parent


@dataclasses.dataclass
class Outcome:
    """What one rank left behind: its result (`None` where it wrote none), its output and its exit status."""

    result: object
    output: str
    status: int | None


def launch(script: str, world_size: int, arguments: object, timeout: float) -> list[Outcome]:
    """Runs `tests/distributed/<script>` on `world_size` ranks.

    The script finds `arguments` with `worker.arguments()` and leaves its result with `worker.leave(result)`. All ranks
    are killed at the time limit, so that a hang fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "WORKER_FOLDER": folder,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        processes, logs = [], []
        for rank in range(world_size):
            log = Path(folder) / f"rank{rank}.log"
            logs.append(log)
            with log.open("w") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(TESTS / "distributed" / script)],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + timeout
        for process in processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                for other in processes:
                    if other.poll() is None:
                        os.killpg(other.pid, signal.SIGKILL)
                process.wait()
        return [
            Outcome(
                torch.load(path, weights_only=False) if (path := Path(folder) / f"result{rank}.pt").exists() else None,
                logs[rank].read_text(errors="replace"),
                process.poll(),
            )
            for rank, process in enumerate(processes)
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
