"""ZeRO-3: DeepSpeed's optimizer with its bucketing and reduction replaced by the engine's.

Read in DeepSpeed 0.18.4 to 0.19.8, `runtime/zero/stage3.py`. Every parameter is cut into W chunks, one a rank, so a
combined shard is made of chunks that are this rank's own: nothing is sent on. What is overridden:

* `reduce_independent_p_g_buckets_and_remove_grads`, called by a hook on every parameter when its gradient is ready;
* `independent_gradient_partition_epilogue`, called at the end of every backward;
* `step` and `_update_scale`, so that a window which is not finite is skipped as an fp16 overflow is.

DeepSpeed's own buckets stay empty. Its `partition_grads` takes the combined chunks, once a window, to wherever it keeps
gradients: on the device, in host memory, or on a disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from bucketmoo_ds.adapters.deepspeed.reduction import ZeroReduction
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.plan.blocks import BlockPlan, plain_name
from bucketmoo_ds.plan.layout import Chunked

if TYPE_CHECKING:
    from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine


class BucketMOOZero3Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """See the module. Made from a `DeepSpeedZeroOptimizer_Stage3` by `attach`."""

    reduction: ShardReduction
    overflow: bool

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Tensor) -> None:
        """Takes a gradient that is ready."""
        if getattr(param, "ds_grad_is_ready", True):
            self._take(param)

    def _take(self, param: Tensor) -> None:
        if param.grad is not None:
            self.reduction.add(param, param.grad)
            param.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """Ends a micro-step, with what no hook has brought: of a leaf module whose `forward` is not called."""
        for param in (param for group in self.fp16_groups for param in group):
            self._take(param)
        if self.reduction.end_micro_step():
            self.reduction.finish()
            if not get_accelerator().resolves_data_dependency():
                # DeepSpeed then waits for this stream, on which it copies gradients to the host itself.
                self.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
        super().independent_gradient_partition_epilogue()

    def _update_scale(self, has_overflow: bool = False) -> None:
        """Makes it an overflow, on all ranks, where a row of the window was not finite."""
        self.overflow = has_overflow or self.reduction.micro.skipped
        super()._update_scale(self.overflow)

    def step(self, closure: None = None) -> None:
        """Takes the optimizer step, or skips it on all ranks where a row was not finite.

        Raises:
            BucketMOOError: this window's gradients did not pass through the engine.
        """
        self.reduction.check_step()
        self.overflow = False  # older versions keep the last step's where they do not look for one
        super().step(closure)
        self.reduction.micro.use()


class ShardReduction(ZeroReduction):
    """ZeRO-3: a rank's shard of a bucket is what it owns."""

    def __init__(
        self, engine: BucketMOOEngine, optimizer: DeepSpeedZeroOptimizer_Stage3, plan: BlockPlan, exchange: Exchange
    ) -> None:
        names = {parameter.name: index for index, parameter in enumerate(plan.parameters)}
        index: dict[int, int] = {}
        chunks = [0] * len(plan.parameters)
        self._params: list[Tensor] = [Tensor()] * len(plan.parameters)
        for param in (param for group in optimizer.fp16_groups for param in group if param.requires_grad):
            number = names[plain_name(optimizer.param_names[param])]
            index[id(param)], chunks[number], self._params[number] = number, param.partition_numel(), param
        self._layout = Chunked(plan, exchange.world_size, chunks)
        super().__init__(
            engine,
            optimizer,
            plan,
            exchange,
            layout=self._layout,
            index=index,
            once_a_window=False,
            device=engine.device,
        )

    def after_exchange(self) -> None:
        """See `StageReduction`. When DeepSpeed knows the order of the modules, ranks that use others wait for each
        other in the next forward pass, while they gather parameters: so they are told before that.

        Raises:
            DisagreementError: on every rank, if they had gradients of different parameters.
        """
        if not self.micro.boundary:
            self.moo.check_contributions()

    def deliver(self, bucket: int, shard: Tensor) -> None:
        """See `ZeroReduction`. The chunks replace what the optimizer kept, as in its first micro-step."""
        params = [self._params[index] for index in self.moo.plan.buckets[bucket].parameters]
        micro_step, self._optimizer.micro_step_id = self._optimizer.micro_step_id, 0
        self._optimizer.partition_grads(params, self._layout.chunks(bucket, shard))
        self._optimizer.micro_step_id = micro_step
