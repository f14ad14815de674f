"""The arms of the wrapper benchmark: FSDP2, FSDP1 or DDP, with bucket_moo and without."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from step_model import Layer
from step_worker import Arm, Run, Settings
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import bucketmoo_ds
from bucketmoo_ds.adapters.session import Session

WRAPPERS = ("fsdp2", "fsdp1", "ddp")

# What a rank imports; some of it FSDP and the optimizer import when they are first used.
PRELOADED = ["wrappers_worker", "deepspeed", "torch._dynamo"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrapperSettings(Settings):
    """What all arms of a process set share.

    Args:
        wrapper: one of `WRAPPERS`.
    """

    wrapper: str

    def run(self, arm: Arm, rank: int) -> WrappedRun:
        """See `Settings`."""
        return WrappedRun(self, arm, rank)


class WrappedRun(Run):
    """A wrapped model of one arm."""

    def __init__(self, settings: WrapperSettings, arm: Arm, rank: int) -> None:
        super().__init__(settings, arm, rank)
        self.wrapper = settings.wrapper
        self.model = _wrap(self.model, settings)
        self.session = _register(self.model, settings.wrapper, arm) if arm.aggregator is not None else None
        self.moo = self.session.moo if self.session is not None else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def window(self) -> None:
        """See `Run`."""
        for step, batch in enumerate(self.batches):
            with self._synchronised(step + 1 == len(self.batches) or not self.arm.once_a_window):
                (self.model(**batch) / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _synchronised(self, reduce: bool) -> contextlib.AbstractContextManager[None]:
        """Whether the wrapper reduces in this micro-step, said in the wrapper's own way."""
        if self.wrapper != "fsdp2":
            return contextlib.nullcontext() if reduce else self.model.no_sync()
        if self.session is None:  # which says it itself
            self.model.set_requires_gradient_sync(reduce)
        return contextlib.nullcontext()


def _wrap(model: nn.Module, settings: WrapperSettings) -> nn.Module:
    """Layer by layer, or in buckets of `bucket_elements`; gradients travel in the settings' dtype, and what layers hand
    on stays in float32, in which the model computes."""
    dtype = DTYPES[settings.dtype]
    if settings.wrapper == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    if settings.wrapper == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Layer}),
            mixed_precision=MixedPrecision(param_dtype=dtype, cast_root_forward_inputs=False),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    megabytes = settings.bucket_elements * dtype.itemsize / 2**20
    return DistributedDataParallel(model.to(dtype), bucket_cap_mb=megabytes, gradient_as_bucket_view=True)


def _register(model: nn.Module, wrapper: str, arm: Arm) -> Session:
    adapter = getattr(bucketmoo_ds, wrapper)
    return adapter.register(model, arm.config, micro_steps=arm.micro_steps, once_a_window=arm.once_a_window)
