"""The arms of the wrapper benchmark: a wrapper of `bucketmoo_ds.adapters.table`, with bucket_moo and without."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from step_worker import Arm, Run, Settings

from bucketmoo_ds.adapters import table

WRAPPERS = {each.name: each for each in table.FRAMEWORKS if each.wrap and each.plain}

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
        wrapper, dtype = WRAPPERS[settings.wrapper], DTYPES[settings.dtype]
        assert wrapper.wrap is not None
        # Layer by layer, or in buckets of `bucket_elements`; gradients travel in `dtype`, and what layers hand on stays
        # in float32, in which the model computes.
        self.model = wrapper.wrap(self.model, self.model.layers, dtype, settings.bucket_elements * dtype.itemsize)
        self.session = None
        if arm.aggregator is not None:
            once = {"once_a_window": True} if arm.once_a_window else {}
            self.session = wrapper.load().register(self.model, arm.config, micro_steps=arm.micro_steps, **once)
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
        if hasattr(self.model, "no_sync"):
            return contextlib.nullcontext() if reduce else self.model.no_sync()
        if self.session is None:  # which says it itself
            self.model.set_requires_gradient_sync(reduce)
        return contextlib.nullcontext()
