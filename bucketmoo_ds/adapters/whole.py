"""Models whose parameters lie whole on every rank: what the adapters of DDP, of ZeRO-0 and of one
process alone share.

Gradients are gathered in the plan's own static buckets and exchanged in the plan's order, whatever buckets a wrapper
has. Every rank resolves an even slice of each bucket, and all ranks gather the combined slices.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bucketmoo_ds.adapters.session import Adapter
from bucketmoo_ds.adapters.staging import Staging
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks
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


class Whole(Adapter):
    """Gathers gradients, and hands out combined ones.

    Args:
        caller: what messages begin with.
        model: the model itself, without a wrapper.
        config: the settings.
        exchange: the ranks that hold the model.
        micro_steps, local: see `BucketMOO`.
        bucket_size: elements a bucket may hold; `None` for `bucket_bytes`.
        bucket_bytes: the same in bytes.

    Raises:
        ConfigError: see `trained_parameters` and `BucketMOO`; or a bucket size below 1.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        config: BucketMOOConfig,
        exchange: Exchange,
        *,
        micro_steps: int,
        local: bool,
        bucket_size: int | None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        trained = trained_parameters(model, caller)
        dtype = functools.reduce(torch.promote_types, [parameter.dtype for parameter in trained.values()])
        if bucket_size is None:
            bucket_size = max(bucket_bytes // dtype.itemsize, 1)
        if bucket_size < 1:
            raise ConfigError(f"{caller}: bucket_size = {bucket_size}: expected at least 1 element")
        sizes = [Parameter(name, parameter.numel()) for name, parameter in trained.items()]
        plan = plan_blocks(sizes, bucket_size, config.granularity)
        self.parameters = list(trained.values())
        self._model = model
        device = self.parameters[0].device
        self.moo = BucketMOO(
            config,
            plan,
            exchange,
            self._deliver,
            micro_steps=micro_steps,
            local=local,
            result_dtype=dtype,
            overlap=exchange.world_size > 1,
            device=device,
        )
        layout = Consecutive(plan, [exchange.shard_numel(bucket.numel) for bucket in plan.buckets])
        self._staging = Staging(plan, layout, exchange.world_size, dtype, device, self.moo.ingest)
        self._index: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(self.parameters)}
        self._delivering: dict[int, Received] = {}

    def begin(self, factor: float, boundary: bool) -> None:
        """See `Adapter`. What `.grad` held before a window is no part of it."""
        self._exchanges = boundary or not self.moo.window.local
        self._staging.start_window()
        if len(self.moo.window.table) == 1:
            for parameter in self.parameters:
                parameter.grad = None

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Copies the gradient of a parameter; buckets leave when they are complete and it is their turn.

        Raises:
            BucketMOOError: no micro-step has begun.
        """
        self.check_open()
        self._staging.add(self._index[parameter], gradient, 1.0)
        self._staging.release_complete()

    def end(self) -> list[bool]:
        """See `Adapter`. A parameter without a gradient counts as a gradient of zeros.

        Raises:
            BucketMOOError: gradients took another way.
        """
        contributed = self._staging.contributed
        if self._exchanges:
            self._check_taken(contributed)
            self._staging.release_all()
        return contributed

    def _check_taken(self, contributed: list[bool]) -> None:
        taken = dict(zip(self.parameters, contributed, strict=True))
        missed = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None and not taken.get(parameter)
        ]
        if missed:
            raise BucketMOOError(
                f'the gradient of parameter "{missed[0]}" ({len(missed)} in all) took another way: unfreeze, add and '
                "replace parameters (load_state_dict with assign=True does) before wrapping and register, and under "
                "DDP call backward once after every forward pass, before the next one"
            )

    @torch.no_grad()
    def write(self) -> None:
        """See `Adapter`."""
        for bucket, received in self._delivering.items():
            flat = received.wait()
            members = self.moo.plan.buckets[bucket]
            for index, offset in zip(members.parameters, members.offsets, strict=True):
                shape = self.parameters[index].shape
                self.assign(index, flat.narrow(0, offset, shape.numel()).view(shape))
        self._delivering.clear()

    def assign(self, index: int, combined: Tensor) -> None:
        """Makes a combined gradient, which nobody else uses, the `.grad` of its parameter."""
        raise NotImplementedError

    def _deliver(self, bucket: int, shard: Tensor) -> None:
        """The engine's sink."""
        self._delivering[bucket] = self.moo.exchange.all_gather(shard)
