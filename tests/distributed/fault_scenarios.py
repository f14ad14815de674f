"""Worker: windows that must not end in a step, and how training goes on after them."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import torch
import toy
import worker
from setup_engine import LANGUAGES, generator_for, language_of, make_engine, settings, train_window
from torch import nn
from torch.utils.checkpoint import checkpoint

import bucketmoo_ds  # noqa: F401 (teaches DeepSpeed the section)

SEED = 7


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


def not_finite(
    *, stage: int, dtype: str, mode: str, micro_steps: int, value: float, where: str | None, offload: bool
) -> dict[str, Any]:
    """In the second of four windows, the gradients of "fr" hold `value`: all of them, or one parameter's."""
    config = settings(stage, dtype=dtype, micro_steps=micro_steps, offload=offload, moo={"mode": mode})
    engine = make_engine(config, seed=SEED, optimizer=torch.optim.Adam)
    generator = generator_for(SEED)
    train_window(engine, generator)
    before = worker.checksum([*worker.weights(engine.module), *worker.optimizer_state(engine.optimizer)])
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("bucketmoo_ds").addHandler(handler)
    _poisoned_window(engine, generator, value, where)
    logging.getLogger("bucketmoo_ds").removeHandler(handler)
    after = worker.checksum([*worker.weights(engine.module), *worker.optimizer_state(engine.optimizer)])
    found = {
        "unchanged": before == after,
        "nonfinite": engine.moo.last.nonfinite,
        "skipped_steps": engine.skipped_steps,
        "log": logged.getvalue(),
        "buckets": [bucket.name for bucket in engine.moo.plan.buckets],
    }
    for window in (2, 3):
        train_window(engine, generator, window)
    return found | {
        "counters": dict(engine.moo.counters),
        "goes_on": worker.checksum(worker.weights(engine.module)) != before,
        "finite": all(bool(each.isfinite().all()) for each in worker.weights(engine.module)),
        "nonfinite_later": engine.moo.last.nonfinite,
        "parameters": worker.checksum(worker.weights(engine.module)),
    }


def _poisoned_window(engine: Any, generator: torch.Generator, value: float, where: str | None) -> None:
    parameters = dict(engine.module.named_parameters())
    for step in range(engine.gradient_accumulation_steps()):
        language = language_of(1 if engine.zero_optimization_stage() == 1 else 1 + step)
        poisoned = LANGUAGES[language] == "fr"
        loss = engine(**toy.micro_batch(language, generator), language=LANGUAGES[language])
        handle = None
        if poisoned and where is not None:
            handle = parameters[where].register_hook(lambda gradient: torch.full_like(gradient, value))
        engine.backward(loss * value if poisoned and where is None else loss)
        if handle is not None:
            handle.remove()
        engine.step()


def overflow(*, stage: int, micro_steps: int, offload: bool, hysteresis: int) -> dict[str, Any]:
    """fp16 with dynamic scaling: in the second of four windows the loss of "fr" is large enough to overflow."""
    config = settings(stage, dtype="fp16", micro_steps=micro_steps, offload=offload, moo={})
    config["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 1000, "hysteresis": hysteresis}
    engine = make_engine(config, seed=SEED, optimizer=torch.optim.Adam)
    generator = generator_for(SEED)
    scales, bits, nonfinite = [], [], []
    for window in range(4):
        if window == 1:
            _poisoned_window(engine, generator, 1e6, None)
        else:
            train_window(engine, generator, window)
        scales.append(float(engine.optimizer.loss_scale))
        bits.append(worker.checksum([*worker.weights(engine.module), *worker.optimizer_state(engine.optimizer)]))
        nonfinite.append({language for language, _ in engine.moo.last.nonfinite})
    return {
        "scales": scales,
        "bits": bits,
        "nonfinite": nonfinite,
        "skipped_steps": engine.skipped_steps,
        "counters": dict(engine.moo.counters),
        "finite": all(bool(each.isfinite().all()) for each in worker.weights(engine.module)),
        "parameters": worker.checksum(worker.weights(engine.module)),
    }


def adapters_of_ranks(stage: int, adapters: list[int | None], micro_steps: int) -> None:
    """In the second window, rank r's forward passes use adapter `adapters[r]`.

    On ZeRO-3 in the first one: when DeepSpeed knows the order of the modules, ranks that use others wait for each other
    while they gather parameters, with or without bucket_moo.
    """
    engine = make_engine(settings(stage, micro_steps=micro_steps, moo={}), seed=SEED, adapters=2)
    generator = generator_for(SEED)
    if stage < 3:
        train_window(engine, generator, adapter=0)
    train_window(engine, generator, adapter=adapters[worker.RANK])


def adapter_used_on_all(stage: int) -> bool:
    """Parameters that all ranks use in one window and none in the next are no disagreement."""
    engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=SEED, adapters=2)
    generator = generator_for(SEED)
    for adapter in (0, None, 1):
        train_window(engine, generator, adapter=adapter)
    return bool(engine.moo.counters["windows"] == 3)


def given_up(stage: int) -> dict[str, Any]:
    """The second of three windows is given up by `engine.zero_grad()`, and the third takes its data."""
    ends = []
    for gives_up in (False, True):
        engine = make_engine(settings(stage, moo={}), seed=SEED)
        train_window(engine, generator_for(SEED))
        if gives_up:
            engine.backward(engine(**toy.micro_batch(2, generator_for(SEED + 1)), language=LANGUAGES[2]))
            engine.zero_grad()
        train_window(engine, generator_for(SEED + 2))
        ends.append(worker.checksum(worker.weights(engine.module)))
    return {"windows": engine.moo.windows, "same": ends[0] == ends[1]}


class _Branches(nn.Module):
    """Calls the modules of a list, never the list."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.branches[0](inputs) + self.branches[1](inputs)).square().mean()


def leaf_modules() -> bool:
    """ZeRO-3, with the list of modules as a leaf, and without."""
    import deepspeed

    ends = []
    for leaf in (False, True):
        torch.manual_seed(SEED)
        module = _Branches()
        if leaf:
            deepspeed.utils.set_z3_leaf_modules(module, [nn.ModuleList])
        config = settings(3, micro_steps=2, moo={})
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        generator = generator_for(SEED)
        for step in range(4):
            with engine.language(language_of(step), target_tokens=1):
                engine.backward(engine(torch.randn(3, 5, generator=generator)))
            engine.step()
        ends.append(worker.checksum(worker.weights(engine.module)))
    return ends[0] == ends[1]


def step_without_backward(stage: int) -> None:
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    train_window(engine, generator_for(SEED))
    engine.step()


def module_behind_the_engine(stage: int) -> None:
    """The engine is passed by: forward and backward of the bare module."""
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    with engine.language("de"):
        engine.module(**toy.micro_batch(0, generator_for(SEED))).backward()
    engine.step()


def gradient_from_elsewhere(stage: int) -> None:
    """Gradients are put into `.grad` by hand."""
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.step()


def backward_after_the_boundary(stage: int) -> None:
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    generator = generator_for(SEED)
    for _ in range(2):
        engine.backward(engine(**toy.micro_batch(0, generator), language="de"))


def coalesced(stage: int) -> None:
    engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=SEED)
    with engine.coalesce_grad_reduction():
        raise AssertionError("the block was entered")


class Recomputed(nn.Module):
    """One layer is used in two checkpoints. If they are reentrant, each has a backward of its own, so that the layer's
    gradient comes twice, and its bucket may have left in between."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = toy.ToyLM()
        self.shared = nn.Linear(13, 13)
        self.last = nn.Linear(13, toy.VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, reentrant: bool) -> torch.Tensor:
        hidden = self.toy.embed(input_ids)
        hidden = checkpoint(lambda value: self.shared(value).tanh(), hidden, use_reentrant=reentrant)
        for layer in self.toy.layers:
            hidden = hidden + layer(hidden)
        hidden = checkpoint(lambda value: self.shared(value).tanh(), hidden, use_reentrant=reentrant)
        logits = self.last(hidden) + self.toy.head(hidden)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def second_gradient(stage: int, reentrant: bool, bucket_size: int) -> str:
    """A layer that is checkpointed twice gets two gradients in one backward if the checkpoints are reentrant."""
    import deepspeed

    torch.manual_seed(SEED)
    module = Recomputed()
    config = settings(stage, moo={"aggregator": "mean"})
    config["zero_optimization"]["reduce_bucket_size"] = bucket_size
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), config=config
    )
    batch = toy.micro_batch(worker.RANK, generator_for(SEED))
    engine.backward(engine(**batch, reentrant=reentrant, language=LANGUAGES[worker.RANK]))
    engine.step()
    return worker.checksum(worker.weights(engine.module))


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        not_finite,
        overflow,
        adapters_of_ranks,
        adapter_used_on_all,
        given_up,
        leaf_modules,
        step_without_backward,
        module_behind_the_engine,
        gradient_from_elsewhere,
        backward_after_the_boundary,
        coalesced,
        second_gradient,
    )
}

if __name__ == "__main__":
    worker.serve(run)
