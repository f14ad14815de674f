"""Worker: saves a run, or takes it up from DeepSpeed's universal checkpoint with another number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import worker
from setup_engine import generator_for, make_engine, settings, train_window

import bucketmoo_ds  # noqa: F401 (teaches DeepSpeed the section)

SEED, WINDOWS = 17, 3


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


def _engine(stage: int, dtype: str, **more: Any) -> Any:
    config = settings(stage, dtype=dtype, micro_steps=2, moo={"aggregator": "pcgrad", "granularity": "layer"}, **more)
    return make_engine(config, seed=SEED, optimizer=torch.optim.Adam)


def save(stage: int, dtype: str, folder: str) -> dict[str, Any]:
    engine = _engine(stage, dtype)
    generator = generator_for(SEED)
    for window in range(WINDOWS):
        train_window(engine, generator, window)
    engine.save_checkpoint(folder, tag="saved")
    return _state(engine)


def load(stage: int, dtype: str, folder: str) -> dict[str, Any]:
    """Returns the state as it was loaded, and whether two more windows are resolved and change it."""
    engine = _engine(stage, dtype, checkpoint={"load_universal": True})
    engine.load_checkpoint(folder, tag="universal")
    found = _state(engine)
    generator = generator_for(SEED + 1)
    for window in range(2):
        train_window(engine, generator, window)
    after = _state(engine)
    goes_on = after["windows"] == found["windows"] + 2 and after["weights"] != found["weights"]
    return found | {"goes_on": goes_on}


def _state(engine: Any) -> dict[str, Any]:
    return {"weights": worker.checksum(worker.weights(engine.module)), "windows": engine.moo.windows}


SCENARIOS: dict[str, Callable[..., Any]] = {function.__name__: function for function in (save, load)}

if __name__ == "__main__":
    worker.serve(run)
