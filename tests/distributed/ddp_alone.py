"""What DDP alone has; scenarios of `wrappers_contract.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import toy
import worker
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from wrappers import LANGUAGES, SEED, Run, config, micro_batch

import bucketmoo_ds


def joined() -> None:
    run = Run("ddp")
    with run.model.join():
        for _ in range(2 + worker.RANK):
            run.window()


class Sealed:
    """A type of output that nobody looks into."""

    __slots__ = ("content",)

    def __init__(self, content: Tensor) -> None:
        self.content = content


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.toy = toy.ToyLM()

    def forward(self, **batch: Any) -> Sealed:
        return Sealed(self.toy(**batch))


def hidden_output() -> str:
    """A step of a model whose loss neither DDP nor a session finds in what it returns."""
    run = Run("ddp", module=Hidden)
    batch = micro_batch(run.language(), 0, run.seed)
    run.model(**batch, language=LANGUAGES[run.language()]).content.backward()
    run.optimizer.step()
    return run.parameters


def failing_hook() -> None:
    """Something goes wrong inside the hook, on all ranks."""
    run = Run("ddp")

    def fail(*_: Any) -> None:
        raise ValueError("the exchange failed")

    run.session.moo.exchange.scatter = fail  # type: ignore[method-assign]
    run.micro_step()


def buckets(how: dict[str, Any]) -> dict[str, Any]:
    """The sizes of DDP's buckets in each backward; the adapter is used before the head, but registered after it."""
    torch.manual_seed(SEED)
    model = DistributedDataParallel(toy.ToyLM(adapters=1), bucket_cap_mb=2 / 1024, **how)
    session, hook = bucketmoo_ds.ddp.comm_hook(model, config(), micro_steps=2)
    sizes: list[int] = []

    def recorded(state, bucket):  # DDP does not read annotations that are text, as they are in this file
        sizes.append(bucket.buffer().numel())
        return hook(state, bucket)

    model.register_comm_hook(session, recorded)
    generator = torch.Generator().manual_seed(SEED + worker.RANK)
    for _ in range(2):
        for language in (0, 1):
            batch = toy.micro_batch(language, generator) | {"adapter": 0}
            (model(**batch, language=LANGUAGES[language]) / 2).backward()
        model.zero_grad()
    return {"sizes": sizes, "planned": [bucket.numel for bucket in session.moo.plan.buckets]}


def memory(width: int) -> list[bool]:
    """Whether every bucket was sent from DDP's own memory, and gathered into it."""
    torch.manual_seed(SEED)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(width, width) for _ in range(4))), bucket_cap_mb=2 / 1024)
    session, hook = bucketmoo_ds.ddp.comm_hook(model, config())
    exchange, used = session.moo.exchange, []
    own: set[int] = set()

    def recorded(state, bucket):
        own.add(bucket.buffer().data_ptr())
        return hook(state, bucket)

    scatter, all_gather = exchange.scatter, exchange.all_gather

    def noted_scatter(flat: Tensor) -> Any:
        used.append(flat.data_ptr() in own)
        return scatter(flat)

    def noted_gather(shard: Tensor, out: Tensor | None = None) -> Any:
        used.append(out is not None and out.data_ptr() in own)
        return all_gather(shard, out=out)

    exchange.scatter, exchange.all_gather = noted_scatter, noted_gather  # type: ignore[method-assign, assignment]
    model.register_comm_hook(session, recorded)
    with session.language(worker.RANK):
        model(torch.randn(3, width)).square().mean().backward()
    return used


class Mixed(nn.Module):
    """Parameters of two dtypes, and one that does not lie in memory as it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(8, 6, dtype=torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.conv(images).mean((2, 3)).bfloat16()).float().square().mean()


def mixed_parameters() -> float:
    """How far the mean of one language is from plain DDP's, relative to each gradient's largest element."""
    torch.manual_seed(SEED)
    module = Mixed()
    plain, model = DistributedDataParallel(copy.deepcopy(module)), DistributedDataParallel(module)
    session = bucketmoo_ds.ddp.register(model, config(aggregator="mean"), micro_steps=2)
    generator = torch.Generator().manual_seed(SEED + worker.RANK)
    for _ in range(2):
        images = torch.randn(3, 4, 5, 5, generator=generator)
        (plain(images) / 2).backward()
        with session.language("de", target_tokens=1):
            (model(images) / 2).backward()
    pairs = zip(module.parameters(), plain.module.parameters(), strict=True)
    return max(float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()) for ours, theirs in pairs)


def gradients_of_unused(adapters: Sequence[Sequence[int]], how: dict[str, Any]) -> list[dict[str, str]]:
    """With `find_unused_parameters`, rank r uses adapter `adapters[m][r]` in micro-step m: which parameters have a
    gradient, and whether it is zero, after each micro-step of a window."""
    how = how | {"find_unused_parameters": True}
    run = Run("ddp", module=lambda: toy.ToyLM(adapters=3), how=how, micro_steps=2)
    found = []
    for used in adapters:
        run.micro_step(adapter=used[worker.RANK])
        found.append(
            {
                name: "none" if each.grad is None else "zero" if not bool(each.grad.any()) else "some"
                for name, each in run.module.named_parameters()
            }
        )
    return found


def bucket_views() -> bool:
    """`.grad` stays the view of DDP's bucket: memory is shared between neighbours."""
    run = Run("ddp", how={"gradient_as_bucket_view": True, "bucket_cap_mb": 25})
    for _ in range(3):
        run.window()
    run.micro_step()
    gradients = [parameter.grad for parameter in run.model.parameters()]
    return len({gradient.untyped_storage().data_ptr() for gradient in gradients if gradient is not None}) == 1


def frozen_and_unfrozen_after_wrapping() -> bool:
    """And before register."""
    torch.manual_seed(SEED)
    module = toy.ToyLM()
    module.layers[0].requires_grad_(False)
    model = DistributedDataParallel(module)
    module.layers[0].requires_grad_(True)
    module.layers[1].requires_grad_(False)
    session = bucketmoo_ds.ddp.register(model, config())
    with session.language(worker.RANK % 2):
        model(**toy.micro_batch(0, torch.Generator().manual_seed(SEED))).backward()
    return all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())


class Recomputed(nn.Module):
    """One layer in two reentrant checkpoints: its gradient comes twice in a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, reentrant: bool) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(2):
            hidden = checkpoint(lambda value: self.shared(value).tanh(), hidden, use_reentrant=reentrant)
        return self.last(hidden).square().mean()


def recomputed_layer(reentrant: bool) -> str:
    """`static_graph` is DDP's own way to have reentrant checkpoints of a shared layer."""
    run = Run("ddp", module=Recomputed, how={"static_graph": True}, micro_steps=2)
    generator = torch.Generator().manual_seed(SEED + worker.RANK)
    for _ in range(2):
        for _ in range(2):
            inputs = torch.randn(6, 4, generator=generator)
            (run.model(inputs, reentrant=reentrant, language=worker.RANK % 2) / 2).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.parameters


SCENARIOS: tuple[Callable[..., Any], ...] = (
    joined,
    hidden_output,
    failing_hook,
    buckets,
    memory,
    mixed_parameters,
    gradients_of_unused,
    bucket_views,
    frozen_and_unfrozen_after_wrapping,
    recomputed_layer,
)
