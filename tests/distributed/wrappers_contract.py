"""Worker: what holds under DDP, FSDP1 and FSDP2 alike: errors on every rank, windows that are not finite, and what must
make no difference. What one of them alone has is in `<wrapper>_alone.py`, what is refused at start-up in
`wrapper_refusals.py`."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ddp_alone
import fsdp1_alone
import fsdp2_alone
import torch
import torch.distributed as dist
import toy
import worker
import wrapper_refusals
from torch import Tensor
from wrappers import LANGUAGES, SEED, WRAPPERS, Run, config

import bucketmoo_ds
from bucketmoo_ds.pipeline import engine


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


# --- errors on every rank -----------------------------------------------------------------------------------------


def unsynced(wrapper: str, ranks: Sequence[int], once_a_window: bool = False) -> None:
    """These ranks leave the last micro-step unreduced, which has to be exchanged; the one before it need not be."""
    run = Run(wrapper, micro_steps=2, once_a_window=once_a_window)
    with run.reduced(0):
        run.micro_step()
    with run.wrapper.unreduced(run.model) if worker.RANK in ranks else run.reduced(1):
        run.micro_step()


def two_forwards(wrapper: str, **how: Any) -> None:
    """The wrapper reduces in the first backward after its latest forward pass only."""
    run = Run(wrapper, micro_steps=2, how=how)
    first, second = run.loss(0), run.loss(0)
    with run.session.language("de"):
        first.backward()
        second.backward()


def wrong_language(wrapper: str, rank: int) -> None:
    run = Run(wrapper)
    run.window()
    batch = toy.micro_batch(0, torch.Generator())
    run.model(**batch, language="es" if rank == worker.RANK else "de").backward()


def changed_language(wrapper: str) -> None:
    run = Run(wrapper, micro_steps=2, once_a_window=True)
    for language in (0, 1):
        with run.reduced(language):
            run.loss(language).backward()


def no_token_at_all(wrapper: str) -> None:
    Run(wrapper).micro_step(labels=torch.full((toy.SEQUENCES, toy.LENGTH), -100))


def step_within_a_window(wrapper: str, once_a_window: bool = False, **how: Any) -> None:
    run = Run(wrapper, how=how, micro_steps=2, once_a_window=once_a_window)
    with run.reduced(0):
        run.micro_step()
    run.optimizer.step()


def backward_after_the_boundary(wrapper: str, **how: Any) -> None:
    run = Run(wrapper, how=how)
    run.micro_step()
    run.micro_step()


def state_within_a_window(wrapper: str) -> None:
    run = Run(wrapper, micro_steps=2)
    run.micro_step()
    run.session.state_dict()


def closed(wrapper: str) -> None:
    run = Run(wrapper)
    run.window()
    run.session.close()
    run.model(**toy.micro_batch(0, torch.Generator())).backward()


def unfrozen(wrapper: str) -> None:
    run = Run(wrapper, module=lambda: toy.ToyLM(frozen=True))
    run.module.requires_grad_(True)
    run.micro_step()


# --- windows that are not finite ----------------------------------------------------------------------------------


def not_finite(
    wrapper: str,
    *,
    micro_steps: int,
    value: float,
    on_nonfinite: str,
    where: str | None = None,
    once_a_window: bool = False,
    how: dict[str, Any] | None = None,
    **moo: Any,
) -> dict[str, Any]:
    """In the second of four windows, the gradients of "fr" hold `value`: all of them, or those of the layers before
    `where`'s output."""
    run = Run(
        wrapper,
        how=how,
        moo=moo,
        micro_steps=micro_steps,
        once_a_window=once_a_window,
        on_nonfinite=on_nonfinite,
        optimizer=torch.optim.AdamW,
    )
    run.window()
    before = worker.checksum(run.state)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("bucketmoo_ds").addHandler(handler)
    for step in range(micro_steps):
        poisoned = LANGUAGES[run.language(step)] == "fr"
        handle = _poison(run.model.get_submodule(where), value) if poisoned and where else None
        with run.reduced(step):
            (run.loss(run.language(step), 1) * (value if poisoned and not where else 1.0)).backward()
        if handle:
            handle.remove()
    logging.getLogger("bucketmoo_ds").removeHandler(handler)
    gradients = run.gradients
    found = {
        "skipped": run.session.skipped,
        "nonfinite": run.session.last.nonfinite,
        "dropped": all(gradient is None for gradient in gradients),
        "nan": all(gradient is not None and bool(gradient.isnan().all()) for gradient in gradients),
        "norm": float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)),
        "log": logged.getvalue(),
        "buckets": [bucket.name for bucket in run.session.moo.plan.buckets],
    }
    if on_nonfinite == "drop":
        run.optimizer.step()
        found["unchanged"] = worker.checksum(run.state) == before
    run.optimizer.zero_grad()
    for window in (2, 3):
        run.window(window)
    return found | {
        "goes_on": worker.checksum(run.state) != before,
        "finite": all(bool(each.isfinite().all()) for each in run.state),
        "skipped_later": run.session.skipped,
        "counters": dict(run.session.moo.counters),
        "weights": worker.checksum([run.session.last.weights]),
    }


def _poison(layer: torch.nn.Module, value: float) -> Any:
    """Makes the gradient of a layer's output `value`."""

    def spoil(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: torch.full_like(gradient, value))

    return layer.register_forward_hook(spoil)


# --- what must make no difference ---------------------------------------------------------------------------------


def zeroing(wrapper: str, ways: Sequence[str], once_a_window: bool = False, **how: Any) -> list[str]:
    """How, and whether, `.grad` is reset between windows and micro-steps: the weights at the end, for each way."""
    ends = []
    for way in ways:
        run = Run(wrapper, micro_steps=2, how=how, once_a_window=once_a_window)
        for window in range(3):
            for step in range(2):
                with run.reduced(step):
                    run.micro_step(window, step)
                if way == "every micro-step" and step == 0:
                    run.optimizer.zero_grad()
            run.optimizer.step()
            if way != "never":
                run.optimizer.zero_grad(set_to_none=way != "zeros")
        ends.append(run.parameters)
    return ends


def plain_step(wrapper: str) -> str:
    run = Run(wrapper)
    run.window()
    return run.parameters


def evaluation_before_backward(wrapper: str) -> str:
    """A forward pass without gradients between a forward pass and its backward."""
    run = Run(wrapper)
    loss = run.loss(worker.RANK)
    with torch.no_grad():
        run.model(**toy.micro_batch(0, torch.Generator().manual_seed(1)))
    loss.backward()
    run.optimizer.step()
    return run.parameters


def subgroups(wrapper: str) -> dict[str, Any]:
    """Ranks 0, 2 and ranks 1, 3 train a model each."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(SEED)
    model = WRAPPERS[wrapper].wrap(toy.ToyLM(), process_group=groups[worker.RANK % 2])
    session = getattr(bucketmoo_ds, wrapper).register(model, config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    language = worker.RANK // 2
    batch = toy.micro_batch(language, torch.Generator().manual_seed(SEED + worker.RANK))
    model(**batch, language=LANGUAGES[language]).backward()
    optimizer.step()
    whole = worker.checksum(WRAPPERS[wrapper].whole(model))
    return {"parameters": whole, "world_size": session.moo.exchange.world_size}


# --- when things happen -------------------------------------------------------------------------------------------


def order_of_events(wrapper: str, mode: str, **how: Any) -> list[str]:
    """One window: gradients, the collectives, and what is combined. Small buckets do not wait for each other."""
    engine.TOGETHER = 1
    run = Run(wrapper, moo={"mode": mode}, how=how)
    run.window()
    events: list[str] = []
    exchange, moo = run.session.moo.exchange, run.session.moo

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            events.append(name)
            return function(*args, **how)

        return call

    for name in ("scatter", "all_gather", "all_to_all_grams", "all_gather_grams"):
        setattr(exchange, name, recorded(name, getattr(exchange, name)))
    if wrapper == "fsdp1":  # nothing is sent when one is there
        moo._sink = recorded("combined", moo._sink)
        fsdp1_alone.on_each_gradient(run.model, lambda: events.append("gradient"))
    else:
        for parameter in run.module.parameters():
            parameter.register_hook(lambda _: events.append("gradient"))
    run.micro_step()
    return events


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        wrapper_refusals.refused,
        unsynced,
        two_forwards,
        wrong_language,
        changed_language,
        no_token_at_all,
        step_within_a_window,
        backward_after_the_boundary,
        state_within_a_window,
        closed,
        unfrozen,
        not_finite,
        zeroing,
        plain_step,
        evaluation_before_backward,
        subgroups,
        order_of_events,
        *ddp_alone.SCENARIOS,
        *fsdp1_alone.SCENARIOS,
        *fsdp2_alone.SCENARIOS,
    )
}

if __name__ == "__main__":
    worker.serve(run)
