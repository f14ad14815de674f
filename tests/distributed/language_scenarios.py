"""Worker: micro-batches whose language is right, said in several ways, or wrong, on one rank or all."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import torch
import toy
import worker
from setup_engine import LANGUAGES, generator_for, language_of, make_engine, settings, train_window

import bucketmoo_ds  # noqa: F401 (teaches DeepSpeed the section)

SEED = 5


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


def one_rank_says(stage: int, entries: dict[str, Any]) -> None:
    """The last rank's batch has these entries, the others' are right."""
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    batch = toy.micro_batch(0, generator_for(SEED))
    last = worker.RANK == worker.WORLD_SIZE - 1
    engine.backward(engine(**batch, **(entries if last else {"language": "de"})))


def language_changes_in_a_window() -> None:
    """ZeRO-1 keeps languages apart, but resolves buckets as they arrive only where there is one of each."""
    engine = make_engine(settings(1, micro_steps=2, moo={"mode": "streaming"}), seed=SEED)
    generator = generator_for(SEED)
    for language in ("de", "fr" if worker.RANK == 1 else "de"):
        engine.backward(engine(**toy.micro_batch(0, generator), language=language))
        engine.step()


def two_languages_in_one_backward(stage: int) -> None:
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    generator = generator_for(SEED)
    losses = [engine(**toy.micro_batch(0, generator), language=language) for language in ("de", "fr")]
    engine.backward(losses[0] + losses[1])


def other_boundary(stage: int) -> None:
    engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=SEED)
    if worker.RANK == 0:
        engine.set_gradient_accumulation_boundary(True)
    train_window(engine, generator_for(SEED))


def other_position() -> None:
    """A rank forgets `engine.step()` after the first micro-step, so that it does not see the boundary."""
    engine = make_engine(settings(2, micro_steps=2, moo={}), seed=SEED)
    generator = generator_for(SEED)
    for step in range(2):
        engine.backward(engine(**toy.micro_batch(0, generator), language="de"))
        if worker.RANK != 0 or step:
            engine.step()


def other_settings(key: str, values: list[Any]) -> None:
    engine = make_engine(settings(2, moo={key: values[worker.RANK % len(values)]}), seed=SEED)
    train_window(engine, generator_for(SEED))


def no_target_anywhere(stage: int) -> None:
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    batch = toy.micro_batch(0, generator_for(SEED), empty=True)
    engine.backward(engine(**batch, language="de"))


def said_in_some_way(stage: int, way: str) -> str:
    """Trains two windows; returns the checksum of the parameters."""
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    generator = generator_for(SEED)
    for window in range(2):
        index = language_of(window)
        batch = toy.micro_batch(index, generator, ragged=True)
        engine.backward(_forward(engine, way, batch, index))
        engine.step()
    return worker.checksum(worker.weights(engine.module))


def _forward(engine: Any, way: str, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
    name = LANGUAGES[index]
    if way == "context":
        with engine.language(name):
            return engine(**batch)
    if way == "context around positional":
        with engine.language(index):
            return engine(batch)
    if way == "positional dictionary":
        return engine(batch | {"language": name})
    said: dict[str, Any] = {
        "name": name,
        "index": index,
        "names": [name] * toy.SEQUENCES,
        "tensor": torch.full((toy.SEQUENCES,), index),
        "scalar tensor": torch.tensor(index),
    }
    return engine(**batch, language=said[way])


def with_evaluation(stage: int, micro_steps: int, evaluate: bool) -> str:
    """Trains two windows, with forward passes in other languages in between that no backward follows."""
    engine = make_engine(settings(stage, micro_steps=micro_steps, moo={}), seed=SEED)
    generator, others = generator_for(SEED), generator_for(SEED + 1)
    for step in range(2 * micro_steps):
        if evaluate:
            engine.eval()
            engine(**toy.micro_batch(1, others), language="fr")
            with torch.no_grad():
                engine.train()
                engine(**toy.micro_batch(2, others), language="pl")
            engine.train()
        index = language_of(step // micro_steps)
        engine.backward(engine(**toy.micro_batch(index, generator), language=LANGUAGES[index]))
        engine.step()
    return worker.checksum(worker.weights(engine.module))


def absent(stage: int) -> dict[str, Any]:
    """Nobody trains on "pl"; the last rank's "fr" batch has no target."""
    engine = make_engine(settings(stage, moo={"aggregator": "mgda"}), seed=SEED)
    last = worker.RANK == worker.WORLD_SIZE - 1
    language = ("de", "fr", "fr")[worker.RANK]
    batch = toy.micro_batch(LANGUAGES.index(language), generator_for(SEED), empty=last)
    engine.backward(engine(**batch, language=language))
    engine.step()
    last_window = engine.moo.last
    return {
        "present": last_window.present,
        "target_tokens": last_window.target_tokens,
        "weights": last_window.weights,
        "gram": last_window.gram,
        "finite": all(bool(each.isfinite().all()) for each in worker.weights(engine.module)),
    }


def start_line() -> str:
    """What is logged while an engine is made, by our logger as its user left it."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("bucketmoo_ds").addHandler(handler)
    make_engine(settings(2, moo={"granularity": "layer"}), seed=SEED)
    logging.getLogger("bucketmoo_ds").removeHandler(handler)
    return logged.getvalue()


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        one_rank_says,
        language_changes_in_a_window,
        two_languages_in_one_backward,
        other_boundary,
        other_position,
        other_settings,
        no_target_anywhere,
        said_in_some_way,
        with_evaluation,
        absent,
        start_line,
    )
}

if __name__ == "__main__":
    worker.serve(run)
