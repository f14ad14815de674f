"""ZeRO-1 and ZeRO-2: DeepSpeed's optimizer with its bucketing and reduction replaced by the engine's.

Read in DeepSpeed 0.18.4 to 0.19.8, `runtime/zero/stage_1_and_2.py`. What is overridden:

* `process_gradients`, called by a hook on every parameter when its gradient is ready;
* `independent_gradient_partition_epilogue`, called at the end of backward (ZeRO-2: of every micro-step) and by
  `reduce_gradients` at the boundary (ZeRO-1);
* `step` and `_update_scale`, so that a window which is not finite is skipped as an fp16 overflow is.

DeepSpeed's own buckets stay empty. Its optimizer, clipping and loss scaling find the combined gradient in
`averaged_gradients`, in the flat form that it uses itself for float32 accumulation, or, with offload, in host memory.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from bucketmoo_ds.adapters.deepspeed.reduction import ZeroReduction
from bucketmoo_ds.comm.delivery import Deliveries, Delivery, Piece
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.plan.blocks import BlockPlan, plain_name
from bucketmoo_ds.plan.layout import Consecutive

if TYPE_CHECKING:
    from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine


class BucketMOOZeroOptimizer(DeepSpeedZeroOptimizer):
    """See the module. Made from a `DeepSpeedZeroOptimizer` by `attach`."""

    reduction: PartitionReduction
    overflow: bool

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
        if self.reduction.end_micro_step():
            self.reduction.finish()
            if self.cpu_offload:
                self._write_to_host()
            else:
                partitions = [self._partition(group) for group in range(len(self.bit16_groups))]
                self.reduction.write([flat for flat, _ in partitions])
                self.averaged_gradients.update(enumerate(pieces for _, pieces in partitions))
        self._epilogue_ran_this_backward = True

    def _write_to_host(self) -> None:
        """With offload the gradient is the `.grad` of the float32 partitions, and norms are kept by parameter."""
        self.reduction.write([partition.grad for partition in self.single_partition_of_fp32_groups])
        for group, params in enumerate(self.params_in_partition):
            gradient = self.single_partition_of_fp32_groups[group].grad
            for param in params:
                _, _, start, numel = self.grad_position[self.get_param_id(param)]
                part = gradient.narrow(0, start, numel)
                self.norm_for_param_grads[self.get_param_id(param)] = part.norm(2, dtype=torch.float64)

    def _partition(self, group: int) -> tuple[Tensor, list[Tensor]]:
        """Returns room for this rank's gradient of a group, flat, and in the pieces in which DeepSpeed reads it: one
        for each parameter, of its shape where it is all here, and what lies between and behind them."""
        if hasattr(self, "_build_compact_grad_partition_buffer"):
            compact = self._build_compact_grad_partition_buffer(group)
            return compact.flat_partition, compact
        size, rank = int(self.partition_size[group]), dist.get_rank(self.real_dp_process_group[group])
        starts, places = self.grad_start_offset[group][rank], self.grad_partition_insertion_offset[group][rank]
        flat = torch.zeros(size, dtype=self.gradient_accumulation_dtype, device=self.bit16_groups[group][0].device)
        pieces: list[Tensor] = []
        end = 0
        for param in self.params_in_partition[group]:
            number = self.get_param_id(param)
            begin = int(places[number])
            pieces += _padding(flat, end, begin)
            end = begin + min(param.numel() - int(starts[number]), size - begin)
            piece = flat[begin:end]
            pieces.append(piece.view(param.shape) if piece.numel() == param.numel() else piece)
        return flat, pieces + _padding(flat, end, size)

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


def _padding(flat: Tensor, begin: int, end: int) -> list[Tensor]:
    if begin == end:
        return []
    padding: Any = flat[begin:end]
    padding._zero_padding = True  # so that DeepSpeed's norm leaves it out
    return [padding]


class PartitionReduction(ZeroReduction):
    """ZeRO-1 and ZeRO-2: partitions are no even slices of a bucket, so combined pieces are sent on to their owners."""

    def __init__(
        self, engine: BucketMOOEngine, optimizer: DeepSpeedZeroOptimizer, plan: BlockPlan, exchange: Exchange
    ) -> None:
        names = {parameter.name: index for index, parameter in enumerate(plan.parameters)}
        index = {
            id(param): names[plain_name(optimizer.param_names[param])]
            for group in optimizer.bit16_groups
            for param in group
            if param.numel() > 0
        }
        shards = [exchange.shard_numel(bucket.numel) for bucket in plan.buckets]
        pieces = partition_pieces(optimizer, plan, index)
        self._deliveries = [Delivery(exchange, pieces[bucket], numel) for bucket, numel in enumerate(shards)]
        self._on_their_way = Deliveries()
        super().__init__(
            engine,
            optimizer,
            plan,
            exchange,
            layout=Consecutive(plan, shards),
            index=index,
            once_a_window=not optimizer.partition_gradients,
            device=optimizer.bit16_groups[0][0].device,
        )

    def deliver(self, bucket: int, shard: Tensor) -> None:
        """See `ZeroReduction`."""
        self._on_their_way.start(bucket, self._deliveries[bucket].start(shard))

    def write(self, partitions: list[Tensor]) -> None:
        """Writes the combined gradient into this rank's flat partitions."""
        self._on_their_way.finish(lambda bucket, arrived: self._deliveries[bucket].finish(arrived, partitions))

    def abandon(self) -> None:
        """See `StageReduction`."""
        super().abandon()
        self._on_their_way.clear()


def partition_pieces(
    optimizer: DeepSpeedZeroOptimizer, plan: BlockPlan, index: dict[int, int]
) -> dict[int, list[Piece]]:
    """Returns, bucket by bucket, which rank owns which run of it: ZeRO-1/2 cut every flat group into W equal parts."""
    owned: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for group, params in enumerate(optimizer.round_robin_bit16_groups):
        size = int(optimizer.partition_size[group])
        if hasattr(optimizer, "round_robin_bit16_offsets"):
            offsets = optimizer.round_robin_bit16_offsets[group]
        else:  # nothing lies between two parameters
            offsets = itertools.accumulate((param.numel() for param in params[:-1]), initial=0)
        for param, first in zip(params, offsets, strict=True):
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
