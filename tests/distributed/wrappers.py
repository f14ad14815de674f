"""DDP, FSDP1 and FSDP2 behind one face, for workers: how each wraps a model, and what a run under it is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import toy
import worker
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bucketmoo_ds

LANGUAGES = ("de", "fr", "pl", "ko")
SEED = 13


def config(**changes: Any) -> bucketmoo_ds.BucketMOOConfig:
    return bucketmoo_ds.BucketMOOConfig(**{"languages": LANGUAGES} | changes)


def ddp(module: nn.Module, **settings: Any) -> nn.Module:
    """Of the toy model, several buckets."""
    return DistributedDataParallel(module, **{"bucket_cap_mb": 2 / 1024} | settings)


def fsdp1(module: nn.Module, *, strategy: str = "FULL_SHARD", layers: bool = True, **settings: Any) -> nn.Module:
    """A unit for each layer, unless `layers` is off, and one for the rest."""
    common = {
        "sharding_strategy": ShardingStrategy[strategy],
        "use_orig_params": True,
        "device_id": torch.device("cpu"),
    } | settings
    for index, layer in enumerate(getattr(module, "layers", ()) if layers else ()):
        module.layers[index] = FullyShardedDataParallel(layer, **common)
    return FullyShardedDataParallel(module, **common)


def fsdp2(module: nn.Module, *, replicas: int = 1, **settings: Any) -> Any:
    """A group for each layer, and one for the rest."""
    if replicas > 1:
        settings["mesh"] = two_dimensional(replicas)
    for layer in module.layers:
        fully_shard(layer, **settings)
    return fully_shard(module, **settings)


def two_dimensional(replicas: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, worker.WORLD_SIZE // replicas), mesh_dim_names=("replicate", "shard"))


@contextlib.contextmanager
def without_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


class Wrapper(NamedTuple):
    """
    Attributes:
        wrap: a module.
        unreduced: the context of a backward whose gradients the wrapper is to leave alone.
        whole: all of a model's parameters: every rank calls it.
        register: default arguments of `register`.
        once_unreduced: whether all micro-steps of a window but the last are unreduced with `once_a_window`.
    """

    wrap: Callable[..., Any]
    unreduced: Callable[[Any], contextlib.AbstractContextManager[None]]
    whole: Callable[[Any], list[Tensor]]
    register: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    once_unreduced: bool = False


WRAPPERS = {
    "ddp": Wrapper(ddp, lambda model: model.no_sync(), lambda model: list(model.parameters())),
    "fsdp1": Wrapper(
        fsdp1, lambda model: model.no_sync(), lambda model: list(model.state_dict().values()), once_unreduced=True
    ),
    "fsdp2": Wrapper(fsdp2, without_sync, lambda model: [each.full_tensor() for each in model.parameters()]),
}


def micro_batch(language: int, window: int = 0, seed: int = SEED) -> dict[str, Any]:
    """This rank's of a window."""
    generator = torch.Generator().manual_seed(seed + 1000 * window + 10 * language + worker.RANK)
    return toy.micro_batch(language, generator, ragged=True)


class Run:
    """A toy model under a wrapper, and what is needed to train it. Rank r's micro-batches are of language r, r + 1 and
    so on in a window; of language r only, where it must not change.

    Args:
        wrapper: a key of `WRAPPERS`.
        module: makes the model.
        how: it is wrapped.
        moo: settings.
        register: arguments of `register`.
    """

    def __init__(
        self,
        wrapper: str,
        *,
        module: Callable[[], nn.Module] = toy.ToyLM,
        how: dict[str, Any] | None = None,
        moo: dict[str, Any] | None = None,
        optimizer: Any = torch.optim.SGD,
        seed: int = SEED,
        **register: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.wrapper, self.seed = WRAPPERS[wrapper], seed
        self.module = module()
        self.model = self.wrapper.wrap(self.module, **(how or {}))
        self.micro_steps = register.get("micro_steps", 1)
        self.once = register.get("once_a_window", False)
        adapter = getattr(bucketmoo_ds, wrapper)
        self.session = adapter.register(self.model, config(**(moo or {})), **self.wrapper.register | register)
        self.optimizer = optimizer(self.model.parameters(), lr=0.05)

    def language(self, step: int = 0) -> int:
        return (worker.RANK + (0 if self.once else step)) % len(LANGUAGES)

    def loss(self, language: int, window: int = 0, **batch: Any) -> Tensor:
        batch = micro_batch(language, window, self.seed) | batch
        return self.model(**batch, language=LANGUAGES[language]) / self.micro_steps

    def micro_step(self, window: int = 0, step: int = 0, **batch: Any) -> None:
        self.loss(self.language(step), window, **batch).backward()

    def reduced(self, step: int) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-step's backward."""
        alone = self.once and self.wrapper.once_unreduced and step < self.micro_steps - 1
        return self.wrapper.unreduced(self.model) if alone else contextlib.nullcontext()

    def window(self, window: int = 0) -> None:
        for step in range(self.micro_steps):
            with self.reduced(step):
                self.micro_step(window, step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def gradients(self) -> list[Tensor | None]:
        """This rank's parts of what there is of them."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.numel()]
        return [None if each is None else getattr(each, "_local_tensor", each) for each in gradients]

    @property
    def state(self) -> list[Tensor]:
        """This rank's parts of parameters, and what the optimizer keeps of them."""
        tensors = []
        for parameter in self.model.parameters():
            kept = self.optimizer.state.get(parameter, {})
            tensors += [parameter, *(kept[name] for name in sorted(kept))]
        return [getattr(tensor.detach(), "_local_tensor", tensor.detach()).reshape(-1) for tensor in tensors]

    @property
    def parameters(self) -> str:
        return worker.checksum(self.wrapper.whole(self.model))
