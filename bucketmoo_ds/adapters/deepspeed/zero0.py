"""ZeRO-0: DeepSpeed's plain data parallelism, every rank with the whole model.

Read in DeepSpeed 0.18.4 to 0.19.8, `runtime/engine.py`. Stock all-reduces `.grad` once, at the boundary, where the
languages of a rank's micro-steps are mixed. Here a hook on every parameter takes its gradient as soon as it is there
and adds it up, each language apart, and at the boundary `.grad` becomes the combined gradient, which clipping and the
optimizer (DeepSpeed's for bf16, or the user's own) find where they look for it. Stock's all-reduce is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine
from bucketmoo_ds.adapters.deepspeed.reduction import StageReduction
from bucketmoo_ds.adapters.micro_step import MicroStep
from bucketmoo_ds.adapters.whole import Whole
from bucketmoo_ds.comm.exchange import Exchange


class ReplicatedEngine(BucketMOOEngine):
    """See the module. Made from a `DeepSpeedEngine` by `attach`."""

    reduction: ReplicatedReduction

    def _backward_epilogue(self) -> None:
        if self.reduction.end_micro_step():
            self.reduction.finish()
        super()._backward_epilogue()

    def buffered_allreduce_fallback(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Stock's all-reduce: gradients are combined by now."""

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the optimizer step, or skips it on all ranks where a row was not finite."""
        self.reduction.check_step()
        if self.reduction.micro.skipped and not hasattr(self.optimizer, "overflow"):
            self.zero_grad()
            self._step_applied = False
            self.skipped_steps += 1
            self.global_steps += 1
            self.global_samples += self.train_batch_size()
        else:  # DeepSpeed's own optimizers find gradients that are no numbers, and skip
            super()._take_model_step(*args, **kwargs)
        self.reduction.micro.use()


class ReplicatedReduction(Whole, StageReduction):
    """Takes gradients from the parameters themselves, driven by the DeepSpeed engine."""

    def __init__(self, engine: BucketMOOEngine, exchange: Exchange) -> None:
        super().__init__(
            "zero_optimization.stage = 0",
            engine.module,
            engine.moo_config,
            exchange,
            micro_steps=engine.gradient_accumulation_steps,
            once_a_window=True,
            bucket_size=int(engine.zero_reduce_bucket_size()),
        )
        self._engine = engine
        self.bind(MicroStep(self.moo, engine.language_tracker))
        self.hook()

    def holds_gradients(self) -> bool:
        """See `StageReduction`."""
        return any(bool(gradient.count_nonzero()) for gradient in self.gradients(self.parameters))

    def finish(self) -> None:
        """Resolves the window, whose gradients are then where DeepSpeed and the user's optimizer look for them."""
        self.micro.resolve()
        self.write()
        if self.micro.skipped:
            for parameter in self.parameters:
                parameter.grad = torch.full_like(parameter, float("nan"))

    def abandon(self) -> None:
        """See `StageReduction`."""
        StageReduction.abandon(self)
        super().abandon()

    def assign(self, index: int, combined: Tensor) -> None:
        """See `Whole`. A parameter that is frozen by now has no gradient, so that the optimizer leaves it alone."""
        parameter = self.parameters[index]
        parameter.grad = combined.to(parameter.dtype) if parameter.requires_grad else None
