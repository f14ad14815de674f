"""Worker: trains the toy model with DeepSpeed, with or without our package in the process.

The batches are of one language each, so that `mean` can be compared with what DeepSpeed itself does.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import toy
import worker
from setup_engine import LANGUAGES, make_engine, settings

SEED = 11
STEPS = 4
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def run(
    *,
    package: bool,
    stage: int,
    dtype: str,
    micro_steps: int,
    optimizer: str,
    moo: dict[str, Any] | None,
    ragged: bool = False,
    languages: int = len(LANGUAGES),
    by_tokens: bool = False,
) -> dict[str, Any]:
    """Trains `STEPS` windows; a window with a bucket_moo section passes the languages, one without does not.

    Args:
        package: whether our package is imported before the engine is made.
        languages: how many are used, in rotation over the slots.
        by_tokens: scales every loss, so that DeepSpeed's average of W M micro-batches is the mean over all tokens.
    """
    if package:
        importlib.import_module("bucketmoo_ds")
    on = moo is not None and moo.get("enabled", True)
    config = settings(stage, dtype=dtype, micro_steps=micro_steps, moo=moo, gradient_clipping=0.5)
    config["zero_optimization"]["overlap_comm"] = stage >= 2
    engine = make_engine(config, seed=SEED, optimizer=OPTIMIZERS[optimizer])
    generators = [torch.Generator().manual_seed(SEED + rank) for rank in range(worker.WORLD_SIZE)]
    for window in range(STEPS):
        slots = [_slots(window, step, stage, languages) for step in range(micro_steps)]
        batches = [
            [toy.micro_batch(*slot, ragged=ragged) for slot in zip(row, generators, strict=True)]
            for row in slots
        ]
        tokens = sum(toy.tokens_of(batch) for row in batches for batch in row)
        for row, mine in zip(slots, (row[worker.RANK] for row in batches), strict=True):
            loss = engine(**mine, **({"language": LANGUAGES[row[worker.RANK]]} if on else {}))
            if by_tokens:
                loss = loss * (toy.tokens_of(mine) * worker.WORLD_SIZE * micro_steps / tokens)
            engine.backward(loss)
            engine.step()
    return {
        "type": type(engine).__name__,
        "imported": "bucketmoo_ds" in sys.modules,
        "bits": worker.checksum([*worker.weights(engine.module), *worker.optimizer_state(engine.optimizer)]),
        "parameters": torch.cat([each.double().flatten() for each in worker.weights(engine.module)]),
    }


def _slots(window: int, step: int, stage: int, languages: int) -> list[int]:
    first = 0 if stage == 1 else step * worker.WORLD_SIZE
    return [(window + first + rank) % languages for rank in range(worker.WORLD_SIZE)]


if __name__ == "__main__":
    worker.serve(run)
