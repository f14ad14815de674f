"""Worker: trains and saves after every window, from the latest checkpoint on; some ranks die at a given moment."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import worker
from train_and_resume import WINDOWS, Run

from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.pipeline import checkpoint, engine

# Where a rank can die: what is called there. A window calls each of them at least once, and so does every save.
MOMENTS: dict[str, tuple[Any, str]] = {
    "forward": (deepspeed.DeepSpeedEngine, "forward"),
    "exchange of rows": (Exchange, "scatter"),
    "all-reduce of Grams": (engine.BucketMOO, "finish"),
    "combine": (engine.ops, "combine"),
    "optimizer step": (torch.optim.AdamW, "step"),
    "save of bucket_moo.json": (checkpoint, "save"),
    "save of DeepSpeed's files": (torch, "save"),
    "naming of latest": (checkpoint, "name_latest"),
}


def die_at(moment: str, call: int, after: bool) -> None:
    """This process kills itself before, or after, the given call, counted from 1."""
    owner, name = MOMENTS[moment]
    wrapped: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def call_or_die(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            _die()
        result = wrapped(*args, **kwargs)
        if calls == call:
            _die()
        return result

    setattr(owner, name, call_or_die)


def _die() -> None:
    (worker.FOLDER / f"died{worker.RANK}").write_text(repr(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    run = Run(**case)
    if (folder / "latest").exists():
        run.engine.load_checkpoint(str(folder))
    found = run.state()["bits"] if run.engine.moo.windows else ""
    batches = run.batches()
    while run.engine.moo.windows < WINDOWS:
        run.train(1, batches)
        run.engine.save_checkpoint(str(folder))
    return run.state() | {"resumed_from": found}


def main() -> None:
    worker.start()
    arguments = worker.arguments()
    if worker.RANK in arguments["ranks"]:
        die_at(arguments["moment"], arguments["call"], arguments["after"])
    try:
        result: object = train(Path(arguments["folder"]), arguments["case"])
    except Exception as error:
        traceback.print_exc()
        died = [float(path.read_text()) for path in worker.FOLDER.glob("died*")]
        waited = time.time() - min(died) if died else 0.0
        worker.leave({"error": type(error).__name__, "message": str(error), "seconds": waited})
        sys.stdout.flush()
        os._exit(1)
    worker.leave(result)


if __name__ == "__main__":
    main()
