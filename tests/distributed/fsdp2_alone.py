"""What FSDP2 alone has; scenarios of `wrappers_contract.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import toy
import worker
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from wrapper_refusals import CustomReduceScatter
from wrappers import LANGUAGES, Run, config, fsdp2

import bucketmoo_ds


def ranks_differ(what: str) -> None:
    """The last rank is given something else at register."""
    odd = worker.RANK == worker.WORLD_SIZE - 1
    model, settings, register = toy.ToyLM(), {}, {}
    if what == "model" and odd:
        model = toy.ToyLM(adapters=1)
    if what == "frozen" and odd:
        model.layers[1].requires_grad_(False)
    if what == "languages" and odd:
        settings = {"languages": LANGUAGES[::-1]}
    if what == "aggregator" and odd:
        settings = {"aggregator": "mean"}
    if what == "micro_steps":
        register = {"micro_steps": 3 if odd else 2}
    if what == "once_a_window":
        register = {"micro_steps": 2, "once_a_window": odd}
    model = fully_shard(model) if what == "wrapping" and odd else fsdp2(model)
    bucketmoo_ds.fsdp2.register(model, config(**settings), **register)


def changed_layout(what: str, ranks: list[int]) -> None:
    """After the first micro-step of a window, before the second."""
    model = toy.ToyLM(adapters=1)
    model.layers[1].requires_grad_(False)
    run = Run("fsdp2", module=lambda: model, micro_steps=2)
    run.micro_step()
    if worker.RANK in ranks:
        if what == "unfrozen":
            model.layers[1].requires_grad_(True)
        elif what == "frozen":
            model.layers[0].requires_grad_(False)
        elif what == "frozen in part":
            model.layers[0][0].bias.requires_grad_(False)
        elif what == "added":
            model.adapters.append(nn.Linear(13, 13))
        elif what == "hook":
            model.layers[0][0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
        elif what == "reduce-scatter":
            model.layers[0].set_custom_reduce_scatter(CustomReduceScatter())
    run.micro_step()


def unused_left_out() -> None:
    """Gradients that FSDP2 then leaves out of a bucket would move all that come after them."""
    run = Run("fsdp2", module=lambda: toy.ToyLM(adapters=1))
    run.model.set_reduce_scatter_unused_params(False)
    run.micro_step()


class CalledTwice(toy.ToyLM):
    def logits(self, input_ids: Tensor, adapter: int | None = None) -> Tensor:
        return super().logits(input_ids, adapter) + self.head(self.layers[2](self.embed(input_ids)))


def called_twice() -> None:
    Run("fsdp2", module=CalledTwice).micro_step()


def not_the_root() -> None:
    """Of a model of which another module is the root."""
    model = nn.Sequential(fsdp2(toy.ToyLM()))
    bucketmoo_ds.fsdp2.register(model[0], config())
    fully_shard(model)
    batch = toy.micro_batch(0, torch.Generator())
    model({**batch, "language": "de"}).backward()


def mixed_nodes(once_a_window: bool) -> None:
    run = Run("fsdp2", moo={"exchange": "two_stage", "ranks_per_node": 2}, micro_steps=2, once_a_window=once_a_window)
    run.micro_step()


def resumed(*, seed: int, replicas: int = 1, forget: bool = False, **arguments: Any) -> dict[str, str]:
    """Trains four windows; and two, which are saved, and the other two in a new model. PCGrad's orders are drawn.

    Args:
        forget: whether our part of what was saved is left out.
    """
    arguments |= {"seed": seed, "how": {"replicas": replicas}, "moo": {"aggregator": "pcgrad"}}
    arguments["optimizer"] = torch.optim.AdamW
    whole = Run("fsdp2", **arguments)
    for window in range(4):
        whole.window(window)
    first = Run("fsdp2", **arguments)
    for window in range(2):
        first.window(window)
    saved = first.model.state_dict(), first.optimizer.state_dict(), first.session.state_dict()
    second = Run("fsdp2", **arguments)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.to_local().fill_(float("nan"))
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    if not forget:
        second.session.load_state_dict(saved[2])
    for window in (2, 3):
        second.window(window)
    return {"whole": worker.checksum(whole.state), "resumed": worker.checksum(second.state)}


def unlike_nodes(sizes: list[int]) -> dict[str, Any]:
    """Ranks whose LOCAL_WORLD_SIZE differs, as on nodes of different sizes."""
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[worker.RANK])
    try:
        run = Run("fsdp2")
        run.window()
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = str(worker.WORLD_SIZE)
    return {"nodes": run.session.moo.exchange.nodes, "sent": sorted(run.session.moo.exchange.sent_bytes)}


SCENARIOS: tuple[Callable[..., Any], ...] = (
    ranks_differ,
    changed_layout,
    unused_left_out,
    called_twice,
    not_the_root,
    mixed_nodes,
    resumed,
    unlike_nodes,
)
