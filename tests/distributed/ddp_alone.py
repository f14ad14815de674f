"""What DDP alone has; scenarios of `wrappers_contract.py`."""

from __future__ import annotations

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


def rebuilt_buckets(cap: float) -> dict[str, Any]:
    """The adapter is used before the head, but registered after it: DDP's first buckets are not its later ones."""
    torch.manual_seed(SEED)
    model = DistributedDataParallel(toy.ToyLM(adapters=1), bucket_cap_mb=cap)
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    session, hook = bucketmoo_ds.ddp.comm_hook(model, config(), micro_steps=2, bucket_size=700)
    layouts: list[list[list[str]]] = []

    def recorded(state, bucket):  # DDP does not read annotations that are text, as they are in this file
        if bucket.index() == 0:
            layouts.append([])
        layouts[-1].append([names[parameter] for parameter in bucket.parameters()])
        return hook(state, bucket)

    model.register_comm_hook(session, recorded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(SEED + worker.RANK)
    for _ in range(2):
        for language in (0, 1):
            batch = toy.micro_batch(language, generator) | {"adapter": 0}
            (model(**batch, language=LANGUAGES[language]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"layouts": layouts, "parameters": worker.checksum(model.parameters())}


def gradients_of_unused(adapters: Sequence[int | None]) -> list[dict[str, str]]:
    """With `find_unused_parameters`, rank r uses adapter `adapters[r]`: which parameters have a gradient, and whether
    it is zero, after each micro-step of a window."""
    run = Run("ddp", module=lambda: toy.ToyLM(adapters=3), how={"find_unused_parameters": True}, micro_steps=2)
    found = []
    for _ in range(2):
        run.micro_step(adapter=adapters[worker.RANK])
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


def frozen_after_wrapping() -> bool:
    torch.manual_seed(SEED)
    module = toy.ToyLM()
    model = DistributedDataParallel(module, find_unused_parameters=True)
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
    rebuilt_buckets,
    gradients_of_unused,
    bucket_views,
    frozen_after_wrapping,
    recomputed_layer,
)
