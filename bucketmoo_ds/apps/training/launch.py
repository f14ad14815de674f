"""Starts the ranks of a run on this machine and ends them together, with one readable message when something fails."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bucketmoo_ds.apps.training.environment import PARENT, SETTINGS_STATUS
from bucketmoo_ds.errors import BucketMOOError, MissingPackageError
from bucketmoo_ds.integrations.termination import TERMINATED_STATUS


class RunFailedError(RuntimeError):
    """A rank failed; the others were ended. The message says which, and what it printed last."""


def already_launched() -> bool:
    """Whether torchrun, DeepSpeed's launcher or `launch` started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(
    module: str, arguments: Sequence[str], processes: int, logs: Path, threads: int, patience: float = 30
) -> None:
    """Runs `python -m module arguments` on `processes` ranks until all have ended.

    Rank 0 writes to the terminal, the others to files below `logs`.

    Args:
        threads: for each rank's arithmetic.
        patience: seconds that ranks get to end themselves after SIGTERM.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
        BucketMOOError: a bad setting, which rank 0 has told already.
        RunFailedError: a rank failed. All others have ended.
        KeyboardInterrupt: Ctrl-C, or a request to terminate. All ranks have ended.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingPackageError(
            "the ranks train with DeepSpeed, which is not installed: pip install 'bucketmoo-ds[train]', in a clone: "
            "'.[train]'"
        )
    os.environ |= {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    for name in ("torch.distributed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logs.mkdir(parents=True, exist_ok=True)
    redirects: dict[int, Std] = {rank: Std.ALL if rank else Std.NONE for rank in range(processes)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=int(patience),
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=redirects),
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == SETTINGS_STATUS:
            raise BucketMOOError("stopped by the error above") from error
        if failure.exitcode == TERMINATED_STATUS:
            raise KeyboardInterrupt("SIGTERM") from error
        raise RunFailedError(_explain(rank, failure.exitcode, logs)) from error
    except SignalException as error:
        raise KeyboardInterrupt(signal.Signals(error.sigval).name) from error


def _explain(rank: int, status: int, logs: Path) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = [
        line
        for path in sorted(logs.glob(f"**/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)[-1:]
        for line in path.read_text(errors="replace").strip().splitlines()
    ]
    tail = [f"    {line}" for line in lines[-6:]]
    return "\n".join([f"rank {rank} {how}; the other ranks were ended", *tail, f"    output of the ranks: {logs}"])
