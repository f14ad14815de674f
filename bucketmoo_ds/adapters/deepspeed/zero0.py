"""ZeRO-0: DeepSpeed's plain data parallelism, every rank with the whole model.

Read in DeepSpeed 0.19.8, `runtime/engine.py`. Stock all-reduces `.grad` once, at the boundary, where the languages of a
rank's micro-steps are mixed. Here a hook on every parameter takes its gradient as soon as it is there, so that each
micro-step is exchanged, and at the boundary `.grad` becomes the combined gradient, which clipping and the optimizer
(DeepSpeed's for bf16, or the user's own) find where they look for it. Stock's all-reduce is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine
from bucketmoo_ds.adapters.deepspeed.reduction import StageReduction
from bucketmoo_ds.adapters.whole import Whole
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.errors import BucketMOOError


class ReplicatedEngine(BucketMOOEngine):
    """See the module. Made from a `DeepSpeedEngine` by `attach`."""

    reduction: ReplicatedReduction

    def _backward_epilogue(self) -> None:
        self.reduction.end_micro_step()
        super()._backward_epilogue()

    def buffered_allreduce_fallback(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Stock's all-reduce: gradients are combined by now."""

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        """Takes the optimizer step, or skips it on all ranks where a row was not finite."""
        self.reduction.check_finished()
        if self.reduction.skip and not hasattr(self.optimizer, "overflow"):
            self.zero_grad()
            self._step_applied = False
            self.skipped_steps += 1
            self.global_steps += 1
            self.global_samples += self.train_batch_size()
        else:  # DeepSpeed's own optimizers find gradients that are no numbers, and skip
            super()._take_model_step(lr_kwargs)
        self.reduction.start_window()


class ReplicatedReduction(StageReduction, Whole):
    """Takes gradients from the parameters themselves, driven by the DeepSpeed engine."""

    def __init__(self, engine: BucketMOOEngine, exchange: Exchange) -> None:
        super().__init__(
            "zero_optimization.stage = 0",
            engine.module,
            engine.moo_config,
            exchange,
            micro_steps=engine.gradient_accumulation_steps(),
            local=False,
            bucket_size=int(engine.zero_reduce_bucket_size()),
        )
        self._engine = engine
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._take)
        self.start_window()

    def check_open(self) -> None:
        """See `Adapter`."""
        if not self.is_open:
            raise BucketMOOError(
                "a gradient came outside of engine.backward: call engine.backward and engine.step of the engine that "
                "deepspeed.initialize returned"
            )

    def begin_micro_step(self, boundary: bool) -> None:
        """See `StageReduction`."""
        if self.is_open:
            return
        self._agree(boundary)
        self._boundary = boundary
        self.begin(1.0, boundary)
        self.is_open = True

    def end_micro_step(self) -> None:
        """Exchanges what is left of the micro-step; at the boundary, resolves the window. Again, does nothing."""
        if not self.is_open:
            return
        self.is_open = False
        self.moo.end_micro_step(self.end())
        if not self._boundary:
            return
        self.moo.finish()
        self.write()
        self.finished = True
        if self.skip:
            for parameter in self.parameters:
                parameter.grad = torch.full_like(parameter, float("nan"))

    def assign(self, index: int, combined: Tensor) -> None:
        """See `Whole`."""
        self.parameters[index].grad = combined.to(self.parameters[index].dtype)

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.take(parameter, parameter.grad)
        parameter.grad = None
