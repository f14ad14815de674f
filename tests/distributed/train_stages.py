"""Worker: trains the same model on the same data on some stage of ZeRO; returns all weights."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import toy
import worker
from setup_engine import LANGUAGES, settings

import bucketmoo_ds  # noqa: F401 (teaches DeepSpeed the section)

LEARNING_RATE = 0.05
STEPS, MICRO_STEPS = 10, 2


def run(
    *, seed: int, stage: int, granularity: str, bucket_size: int, aggregator: str, gram_every: int
) -> dict[str, Any]:
    """A rank keeps its language for a window, as ZeRO-1 needs it.

    Returns:
        the final weights, float64, and the largest sum of the norms of a step's weighted rows.
    """
    torch.manual_seed(seed)
    model = toy.ToyLM(small=True)
    moo = {"granularity": granularity, "aggregator": aggregator, "gram_every": gram_every}
    config = settings(stage, micro_steps=MICRO_STEPS, moo=moo)
    config["zero_optimization"] |= {"reduce_bucket_size": bucket_size, "stage3_param_persistence_threshold": 100}
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(1000 * seed + worker.RANK)
    rows = 0.0
    for step in range(STEPS):
        language = (step + worker.RANK) % len(LANGUAGES)
        for _ in range(MICRO_STEPS):
            engine.backward(engine(**toy.micro_batch(language, generator, ragged=True), language=LANGUAGES[language]))
            engine.step()
        last = engine.moo.last
        squares = (last.weights * last.gram.diagonal(dim1=1, dim2=2).sqrt()).sum(dim=1).square()
        rows = max(rows, float(squares.sum().sqrt()))
    return {
        "weights": torch.cat([each.double().flatten() for each in worker.weights(engine.module)]),
        "rows": rows,
        "buckets": len(engine.moo.plan.buckets),
    }


if __name__ == "__main__":
    worker.serve(run)
