"""What FSDP1 alone has; scenarios of `wrappers_contract.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import toy
import worker
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from wrappers import LANGUAGES, SEED, Run, config, fsdp1, micro_batch

import bucketmoo_ds


def synced(rank: int) -> None:
    """This rank runs a micro-step without `no_sync` that must not be exchanged."""
    run = Run("fsdp1", micro_steps=2, once_a_window=True)
    with contextlib.nullcontext() if rank == worker.RANK else run.model.no_sync():
        run.micro_step()


def unregistered() -> None:
    model = fsdp1(toy.ToyLM())
    session, _ = bucketmoo_ds.fsdp1.comm_hook(model, config())
    with session.language("de"):
        model(**toy.micro_batch(0, torch.Generator().manual_seed(SEED))).backward()


class Sometimes(nn.Module):
    """A unit of which a forward pass makes use, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, inputs: Tensor, layers: Sequence[int]) -> Tensor:
        for layer in layers:
            inputs = self.layers[layer](inputs).tanh()
        return inputs.square().mean()


def left_behind() -> None:
    """A unit that is used under `no_sync`, but not in the window's last micro-step."""
    run = Run("fsdp1", module=Sometimes, how={"strategy": "NO_SHARD"}, micro_steps=2, once_a_window=True)
    inputs = torch.ones(3, 4)
    with run.model.no_sync():
        run.model(inputs, [0, 1], language="de").backward()
    run.model(inputs, [0], language="de").backward()


def unequal_units() -> None:
    """Ranks use other units, which a strategy that gathers parameters could not do at all."""
    run = Run("fsdp1", module=Sometimes, how={"strategy": "NO_SHARD"})
    run.model(torch.ones(3, 4), [worker.RANK], language="de").backward()


class Recomputed(nn.Module):
    """Two reentrant checkpoints, whose gradients come one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.parts[0](inputs)
        for part in self.parts[1:]:
            hidden = checkpoint(part, hidden, use_reentrant=True)
        return hidden.square().mean()


def recomputed_units() -> None:
    run = Run("fsdp1", module=Recomputed, how={"strategy": "NO_SHARD"})
    run.model(torch.ones(3, 4), language="de").backward()


def between_micro_steps(**how: Any) -> list[float]:
    """The largest element of all gradients after each micro-step of a window."""
    run = Run("fsdp1", micro_steps=2, how=how)
    found = []
    for _ in range(2):
        run.micro_step()
        gradients = [each.grad for each in run.model.parameters() if each.grad is not None]
        found.append(max(float(gradient.abs().max()) for gradient in gradients if gradient.numel()))
    return found


def unused(**how: Any) -> dict[str, list[bool]]:
    """Two units, of which no rank uses the second: which have gradients, and which an optimizer changes."""
    run = Run(
        "fsdp1",
        module=Sometimes,
        how=how,
        optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, weight_decay=0.1),
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model(torch.ones(3, 4) + worker.RANK, [0], language=worker.RANK % 2).backward()
    units = [list(run.module.layers[index].parameters()) for index in range(2)]
    gradients = [any(parameter.grad is not None for parameter in unit) for unit in units]
    run.optimizer.step()
    after = run.model.state_dict()
    names = ("layers.0.weight", "layers.1.weight")
    return {"gradients": gradients, "changed": [not torch.equal(before[name], after[name]) for name in names]}


def against_plain(layers: Sequence[int], strategy: str) -> float:
    """Units in any order, and more than once, in a forward pass of one language: the largest difference of a combined
    gradient from that of the model without FSDP1, which has it on every rank."""
    run = Run("fsdp1", module=Sometimes, how={"strategy": strategy})
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(SEED))
    plain = Sometimes()
    plain.load_state_dict(run.model.state_dict())
    run.model(inputs, layers, language="de").backward()
    plain(inputs, layers).backward()
    with FullyShardedDataParallel.summon_full_params(run.model, with_grads=True):
        pairs = zip(run.model.parameters(), plain.parameters(), strict=True)
        return max(float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()) for ours, theirs in pairs)


def by_pair() -> str:
    """`comm_hook` and the user's own `register_comm_hook`."""
    torch.manual_seed(SEED)
    model = fsdp1(toy.ToyLM())
    session, hook = bucketmoo_ds.fsdp1.comm_hook(model, config())
    model.register_comm_hook(session, hook)
    with session.language(LANGUAGES[worker.RANK]):
        model(**micro_batch(worker.RANK)).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    return worker.checksum(model.state_dict().values())


def block_names(use_orig_params: bool) -> tuple[list[str], list[str]]:
    """The blocks, and the names of the model's parameters."""
    module = toy.ToyLM(adapters=2)
    names = [name for name, _ in module.named_parameters()]
    for index, layer in enumerate(module.layers):
        module.layers[index] = checkpoint_wrapper(layer)
    model = fsdp1(module, use_orig_params=use_orig_params)
    return list(bucketmoo_ds.fsdp1.register(model, config(granularity="parameter")).moo.plan.blocks), names


def sent(strategy: str) -> dict[str, int]:
    """The bytes of a window of one micro-step, and those of the reduce-scatter that FSDP1 would do."""
    run = Run("fsdp1", how={"strategy": strategy})
    run.micro_step()
    flats = [module._handle.flat_param for module in FullyShardedDataParallel.fsdp_modules(run.model)]
    return dict(run.session.moo.exchange.sent_bytes) | {
        "reduce_scatter": 4 * sum(flat._sharded_size.numel() for flat in flats) * (worker.WORLD_SIZE - 1),
        "elements": sum(flat._unpadded_unsharded_size.numel() for flat in flats),
        "units": len(flats),
    }


def on_each_gradient(model: nn.Module, call: Callable[[], None]) -> None:
    for module in FullyShardedDataParallel.fsdp_modules(model):
        module._handle.flat_param.register_post_accumulate_grad_hook(lambda _: call())


SCENARIOS: tuple[Callable[..., Any], ...] = (
    synced,
    unregistered,
    left_behind,
    unequal_units,
    recomputed_units,
    between_micro_steps,
    unused,
    against_plain,
    by_pair,
    block_names,
    sent,
)
