"""Models whose parameters lie whole on every rank: what the adapters of ZeRO-0 and of one process alone share.

Gradients are gathered in the plan's buckets. Every rank resolves an even slice of each bucket, and all ranks gather the
combined slices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bucketmoo_ds.adapters.hooks import BeforeAccumulation, weak
from bucketmoo_ds.adapters.micro_step import MicroStep
from bucketmoo_ds.adapters.session import Adapter
from bucketmoo_ds.adapters.staging import Gathering
from bucketmoo_ds.comm.delivery import Deliveries
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, granularity_of, plain_name, plan_blocks
from bucketmoo_ds.plan.layout import Consecutive

BUCKET_BYTES = 25 * 2**20  # DDP's own default, so that blocks are the same


def trained_parameters(model: nn.Module, caller: str) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by name, in the model's order, tied ones once.

    Args:
        model: the model itself, without a wrapper.
        caller: what the messages begin with.

    Raises:
        ConfigError: their gradients cannot be gathered, or would be used before they are combined.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(f"{caller}: the model has no trainable parameter")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f'{caller}: module "{name}" has sparse = True, and rows of languages are dense; leave sparse out'
            )
    for name, parameter in trained.items():
        if getattr(parameter, "_in_backward_optimizers", None) or parameter._post_accumulate_grad_hooks:
            raise ConfigError(
                f'{caller}: parameter "{name}" has an optimizer in backward (a post-accumulate-grad hook), which would '
                "step before the gradients are combined; step after backward"
            )
        if isinstance(parameter, DTensor) or hasattr(parameter, "_st_info"):  # the latter: tensor parallelism and DDP
            raise ConfigError(
                f'{caller}: parameter "{name}" is sharded, and its block would be resolved in parts; use fully_shard '
                "and bucketmoo_ds.fsdp2, or leave out tensor parallelism"
            )
    devices = {parameter.device for parameter in trained.values()}
    if len(devices) > 1:
        raise ConfigError(
            f"{caller}: parameters lie on several devices ({', '.join(sorted(map(str, devices)))}), and the slices of "
            "a bucket on one; move the model to one device"
        )
    return trained


def check_taken(model: nn.Module, taken: Container[Tensor]) -> None:
    """Stops where a trainable parameter has a gradient that is none of those that were taken.

    Raises:
        BucketMOOError: it does.
    """
    missed = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None and parameter not in taken
    ]
    if missed:
        raise BucketMOOError(
            f'the gradient of parameter "{missed[0]}" ({len(missed)} in all) took another way: call the model that was '
            "registered, not a module inside of it; unfreeze, add and replace parameters (load_state_dict with "
            "assign=True does) before wrapping and register; and under DDP return tensors (or lists, tuples, "
            "dictionaries and dataclasses of them), and call backward once after every forward pass, before the next "
            "one"
        )


class Registered(Adapter):
    """Knows the trained parameters by themselves.

    Args:
        caller: what messages begin with.
        model: the model itself, without a wrapper.

    Raises:
        ConfigError: see `trained_parameters`.
    """

    def __init__(self, caller: str, model: nn.Module) -> None:
        trained = trained_parameters(model, caller)
        self._model = model
        self.parameters = list(trained.values())
        self._index: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(self.parameters)}
        self._sizes = [Parameter(plain_name(name), parameter.numel()) for name, parameter in trained.items()]
        self._dtype = functools.reduce(torch.promote_types, [parameter.dtype for parameter in trained.values()])
        self._device = self.parameters[0].device
        self._handles: list[Any] = []

    def optimized(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Adapter`."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def nothing_came(self) -> None:
        """See `Adapter`. Unless it brought them to parameters that were not there at register.

        Raises:
            BucketMOOError: it did.
        """
        check_taken(self._model, self._index)

    def close(self) -> None:
        """See `Adapter`."""
        for handle in self._handles:
            handle.remove()


class Whole(Registered):
    """Gathers gradients, and hands out combined ones.

    Args:
        caller, model: see `Registered`.
        config: the settings.
        exchange: the ranks that hold the model.
        micro_steps, once_a_window: see `BucketMOO`.
        bucket_size: elements a bucket may hold; `None` for `BUCKET_BYTES`.

    Raises:
        ConfigError: see `Registered` and `BucketMOO`; or a bucket size below 1.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        config: BucketMOOConfig,
        exchange: Exchange,
        *,
        micro_steps: Callable[[], int],
        once_a_window: bool,
        bucket_size: int | None,
    ) -> None:
        super().__init__(caller, model)
        if bucket_size is None:
            bucket_size = max(BUCKET_BYTES // self._dtype.itemsize, 1)
        if bucket_size < 1:
            raise ConfigError(f"{caller}: bucket_size = {bucket_size}: expected at least 1 element")
        self._deliveries = Deliveries()
        self.moo = BucketMOO(
            config,
            plan_blocks(self._sizes, bucket_size, granularity_of(config)),
            exchange,
            self._deliver,
            micro_steps=micro_steps,
            once_a_window=once_a_window,
            apart=once_a_window,
            result_dtype=self._dtype,
            overlap=exchange.world_size > 1,
            device=self._device,
        )

    def bind(self, micro: MicroStep) -> None:
        """See `Adapter`."""
        super().bind(micro)
        plan, exchange = self.moo.plan, self.moo.exchange
        layout = Consecutive(plan, [exchange.shard_numel(bucket.numel) for bucket in plan.buckets])
        self._gathering = Gathering(micro, layout, self._dtype, self._dtype, self._device)

    def begin(self) -> None:
        """See `Adapter`."""
        self._gathering.begin()
        if self.micro.first:
            for parameter in self.parameters:
                parameter.grad = None

    def hook(self) -> None:
        """Hooks the parameters: the first gradient of a backward opens a micro-step before it is added to `.grad`, and
        each is taken from there. A parameter that is used several times still comes once; under reentrant checkpointing
        it comes several times, and is added up as long as its bucket is here."""
        self._handles.append(BeforeAccumulation(self.parameters, self._come))
        self._handles += [each.register_post_accumulate_grad_hook(weak(self._take)) for each in self.parameters]

    def _come(self, gradient: Tensor) -> None:
        self.arrive()

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gathering.add(self._index[parameter], parameter.grad)
        parameter.grad = None

    def end(self) -> list[bool]:
        """See `Adapter`. A parameter without a gradient counts as a gradient of zeros.

        Raises:
            BucketMOOError: gradients took another way.
        """
        check_taken(self._model, {each for each, index in self._index.items() if self._gathering.has_come(index)})
        return self._gathering.end()

    def abandon(self) -> None:
        """See `Adapter`."""
        self._gathering.start_window()
        self._deliveries.clear()

    @torch.no_grad()
    def write(self) -> None:
        """See `Adapter`."""
        self._deliveries.finish(self._write)

    def assign(self, index: int, combined: Tensor) -> None:
        """Makes a combined gradient, which nobody else uses, the `.grad` of its parameter."""
        raise NotImplementedError

    def _write(self, bucket: int, flat: Tensor) -> None:
        members = self.moo.plan.buckets[bucket]
        for index, offset in zip(members.parameters, members.offsets, strict=True):
            shape = self.parameters[index].shape
            self.assign(index, flat.narrow(0, offset, shape.numel()).view(shape))

    def _deliver(self, bucket: int, shard: Tensor) -> None:
        """The engine's sink."""
        self._deliveries.start(bucket, self.moo.exchange.all_gather(shard))
