"""ZeRO-1 and ZeRO-2: DeepSpeed's optimizer with its bucketing and reduction replaced by the engine's.

Read in DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py`. What is overridden:

* `process_gradients`, called by a hook on every parameter when its gradient is ready;
* `independent_gradient_partition_epilogue`, called at the end of backward (ZeRO-2: of every micro-step) and by
  `reduce_gradients` at the boundary (ZeRO-1);
* `step` and `check_overflow`, so that a window which is not finite is skipped as an fp16 overflow is.

DeepSpeed's own buckets stay empty. Its optimizer, clipping and loss scaling find the combined gradient in
`averaged_gradients`, in the flat form that it uses itself for float32 accumulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from bucketmoo_ds.adapters.staging import Staging
from bucketmoo_ds.blocks import BlockPlan
from bucketmoo_ds.delivery import Delivery, Piece
from bucketmoo_ds.engine import BucketMOO
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.exchange import Exchange, Received

if TYPE_CHECKING:
    from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine


class BucketMOOZeroOptimizer(DeepSpeedZeroOptimizer):
    """See the module. Made from a `DeepSpeedZeroOptimizer` by `take_over`."""

    reduction: Reduction
    overflow: bool
    check_grad_overflow: bool

    def process_gradients(self, param: Tensor, i: int) -> None:
        """Takes a gradient that is ready."""
        if param.grad is None or param.numel() == 0:
            return
        self.reduction.add(param, param.grad)
        param.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """Ends a micro-step that is exchanged."""
        for group in self.bit16_groups:
            for param in group:
                self.process_gradients(param, 0)  # nothing is left where hooks have run
        self.reduction.end_micro_step()
        if self.is_gradient_accumulation_boundary() and not self.reduction.finished:
            groups = range(len(self.bit16_groups))
            partitions = [self._build_compact_grad_partition_buffer(group) for group in groups]
            self.reduction.finish([partition.flat_partition for partition in partitions])
            self.averaged_gradients.update(enumerate(partitions))
        self._epilogue_ran_this_backward = True

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Reports an overflow on all ranks where a row of the window was not finite."""
        super().check_overflow(partition_gradients)
        self.overflow = self.overflow or self.reduction.skip

    def step(self, closure: None = None) -> None:
        """Takes the optimizer step, or skips it on all ranks where a row was not finite.

        Raises:
            BucketMOOError: this window's gradients did not pass through the engine.
        """
        self.reduction.check_finished()
        checks, self.check_grad_overflow = self.check_grad_overflow, self.check_grad_overflow or self.reduction.skip
        try:
            super().step(closure)
        finally:
            self.check_grad_overflow = checks
        self.reduction.start_window()


class Reduction:
    """Connects one ZeRO optimizer with the engine: staging in front of it, delivery to the partitions behind it.

    Args:
        engine: the DeepSpeed engine, which knows the languages.
        optimizer: its optimizer.
        moo: the pipeline; its sink is `self.deliver`.
        plan, exchange: as in `moo`.
    """

    def __init__(
        self, engine: BucketMOOEngine, optimizer: DeepSpeedZeroOptimizer, plan: BlockPlan, exchange: Exchange
    ) -> None:
        config, local = engine.moo_config, not optimizer.partition_gradients
        device = optimizer.bit16_groups[0][0].device
        self.moo = BucketMOO(
            config,
            plan,
            exchange,
            self.deliver,
            micro_steps=engine.gradient_accumulation_steps(),
            local=local,
            result_dtype=optimizer.gradient_accumulation_dtype,
            overlap=bool(optimizer.overlap_comm),
            device=device,
        )
        padded = [exchange.world_size * exchange.shard_numel(bucket.numel) for bucket in plan.buckets]
        # ZeRO-1 adds up the micro-steps of a window here, so in the dtype that the user chose for that.
        self._wire_dtype = optimizer.communication_data_type
        staging_dtype = optimizer.gradient_accumulation_dtype if local else self._wire_dtype
        self._staging = Staging(plan, padded, staging_dtype, device, self._ingest)
        names = {parameter.name: index for index, parameter in enumerate(plan.parameters)}
        self._index = {
            id(param): names[optimizer.param_names[param]]
            for group in optimizer.bit16_groups
            for param in group
            if param.numel() > 0
        }
        pieces = partition_pieces(optimizer, plan, self._index)
        self._deliveries = [
            Delivery(exchange, pieces[bucket], exchange.shard_numel(plan.buckets[bucket].numel))
            for bucket in range(len(plan.buckets))
        ]
        self._engine = engine
        self.start_window()

    @property
    def skip(self) -> bool:
        """Whether the window that is closed now holds a row that is not finite."""
        return self.moo.last is not None and bool(self.moo.last.nonfinite)

    def start_window(self) -> None:
        """After an optimizer step: nothing is resolved yet."""
        self.finished = False
        self._open = False
        self._delivering: dict[int, Received] = {}
        self._staging.start_window()

    def begin_micro_step(self, boundary: bool) -> None:
        """Agrees with the other ranks on this micro-step's languages; further calls in the same one do nothing."""
        if self._open:
            return
        if self.finished:
            raise BucketMOOError("backward after the boundary of a window: call engine.step() first")
        slot = self._engine.language_tracker.slot(self.moo.micro_steps, self.moo.exchange.world_size)
        self.moo.begin_micro_step(slot, boundary)
        self._open = True
        window = self.moo.window
        self._counts = window.table[-1][self.moo.exchange.rank].target_tokens > 0
        self._factor = window.local_factor(self.moo.exchange.rank) if window.local else 1.0
        self._boundary = boundary
        if window.local:
            self._staging.start_micro_step()
        else:
            self._staging.start_window()

    def add(self, param: Tensor, gradient: Tensor) -> None:
        """Takes the gradient of one parameter; of a micro-batch without a target token it is no number."""
        self.begin_micro_step(self._engine.at_boundary())
        if not self._counts:
            gradient = torch.zeros_like(gradient)
        self._staging.add(self._index[id(param)], gradient, self._factor)
        if self._boundary or not self.moo.window.local:
            self._staging.release_complete()

    def end_micro_step(self) -> None:
        """Exchanges what is left of the micro-step; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        contributed = self._staging.contributed
        if self._boundary or not self.moo.window.local:
            self._staging.release_all()
        self.moo.end_micro_step(contributed)

    def close_local_micro_step(self) -> None:
        """ZeRO-1 before the boundary: the next backward is another micro-step."""
        if self.moo.window.local and not self._boundary:
            self._open = False

    def deliver(self, bucket: int, shard: Tensor) -> None:
        """Sends a combined shard to its owners."""
        self._delivering[bucket] = self._deliveries[bucket].start(shard)

    def finish(self, partitions: list[Tensor]) -> None:
        """Resolves the window into this rank's flat partitions."""
        self.moo.finish()
        for bucket, received in self._delivering.items():
            self._deliveries[bucket].finish(received, partitions)
        self._delivering.clear()
        self.finished = True

    def check_finished(self) -> None:
        """Stops a step whose gradients took another way."""
        if not self.finished:
            raise BucketMOOError(
                "optimizer step without a resolved window: the gradients of this window did not pass through "
                "bucket_moo (call engine.backward and engine.step of the engine that deepspeed.initialize returned)"
            )

    def _ingest(self, bucket: int, flat: Tensor) -> None:
        self.moo.ingest(bucket, flat.to(self._wire_dtype))


def partition_pieces(
    optimizer: DeepSpeedZeroOptimizer, plan: BlockPlan, index: dict[int, int]
) -> dict[int, list[Piece]]:
    """Returns, bucket by bucket, which rank owns which run of it: ZeRO-1/2 cut every flat group into W equal parts."""
    owned: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for group, params in enumerate(optimizer.round_robin_bit16_groups):
        size = int(optimizer.partition_size[group])
        for param, first in zip(params, optimizer.round_robin_bit16_offsets[group], strict=True):
            begin = int(first)
            while begin < first + param.numel():
                owner = begin // size
                stop = min(int(first) + param.numel(), (owner + 1) * size)
                run = (begin - int(first), stop - begin, owner, group, begin - owner * size)
                owned.setdefault(index[id(param)], []).append(run)
                begin = stop
    return {
        number: [
            Piece(offset + start, numel, owner, target, target_start)
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True)
            for start, numel, owner, target, target_start in owned[parameter]
        ]
        for number, bucket in enumerate(plan.buckets)
    }
