"""Worker: one rank dies in the middle of a window; the others must not wait for it for ever."""

from __future__ import annotations

import os

import toy
import worker
from setup_engine import LANGUAGES, generator_for, make_engine, settings, train_window

import bucketmoo_ds  # noqa: F401 (teaches DeepSpeed the section)

if __name__ == "__main__":
    worker.start()
    (stage,) = worker.arguments()
    engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=3)
    generator = generator_for(3)
    train_window(engine, generator)
    worker.leave("one window done")
    loss = engine(**toy.micro_batch(0, generator), language=LANGUAGES[0])
    if worker.RANK == 1:
        os._exit(3)
    try:
        for _ in range(2):
            engine.backward(loss)
            engine.step()
            loss = engine(**toy.micro_batch(0, generator), language=LANGUAGES[0])
    except RuntimeError as error:
        worker.leave(str(error))
        os._exit(1)
    worker.leave("went on without rank 1")
