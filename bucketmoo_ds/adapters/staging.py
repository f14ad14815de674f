"""Gathers the gradients that autograd delivers one by one into the plan's buckets, and hands complete ones over."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bucketmoo_ds.adapters.micro_step import MicroStep
from bucketmoo_ds.adapters.release import Release
from bucketmoo_ds.data.batch import Row
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.plan.blocks import BlockPlan
from bucketmoo_ds.plan.layout import Layout


class Staging:
    """Flat buffers of the buckets of one micro-step or, where a rank adds up micro-steps, of one row of a window.

    Args:
        plan: the buckets.
        layout: of a bucket's buffer, `[W * S]`; the padding is zero.
        world_size: W.
        dtype: dtype in which gradients are added up.
        device: where the buffers lie.
    """

    def __init__(
        self, plan: BlockPlan, layout: Layout, world_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._plan = plan
        self._layout = layout
        self._world_size = world_size
        self._dtype = dtype
        self._device = device
        self._place = {
            index: (number, member)
            for number, bucket in enumerate(plan.buckets)
            for member, index in enumerate(bucket.parameters)
        }
        self.start_window()

    def start_window(self) -> None:
        """Forgets all gradients."""
        self._buffers: dict[int, Tensor] = {}
        self._filled: set[int] = set()
        self.start_micro_step()

    def start_micro_step(self) -> None:
        """Expects every parameter once more; gradients that are still here are added to."""
        self._arrived: set[int] = set()
        self._waiting = [len(bucket.parameters) for bucket in self._plan.buckets]

    def bucket_of(self, parameter: int) -> int:
        """Returns the bucket that a parameter lies in."""
        return self._place[parameter][0]

    def add(self, parameter: int, gradient: Tensor, factor: float) -> bool:
        """Adds `factor * gradient` to its place; 0 stands for a gradient of zeros, whatever it holds.

        Returns:
            Whether this completes the bucket of the parameter.
        """
        bucket, member = self._place[parameter]
        flat = gradient.detach().reshape(-1)  # under `create_graph` it would keep the graph
        for target, start, numel in self._layout.parts(self._buffer(bucket), bucket, member):
            source = flat.narrow(0, start, numel).view_as(target)
            if parameter not in self._filled:
                target.copy_(source) if factor else target.zero_()
                if factor not in (0.0, 1.0):
                    target.mul_(factor)
            elif factor:
                target.add_(source, alpha=factor)
        self._filled.add(parameter)
        if parameter in self._arrived:
            return False
        self._arrived.add(parameter)
        self._waiting[bucket] -= 1
        return self._waiting[bucket] == 0

    def has_come(self, parameter: int) -> bool:
        """Whether a gradient of the parameter has come in this micro-step."""
        return parameter in self._arrived

    def take(self, bucket: int) -> Tensor:
        """Hands a bucket over, `[W * S]`; parameters without a gradient count as zero."""
        flat = self._buffer(bucket)
        for member, index in enumerate(self._plan.buckets[bucket].parameters):
            if index not in self._filled:
                for part in self._layout.parts(flat, bucket, member):
                    part.target.zero_()
        for padding in self._layout.padding(flat, bucket):
            padding.zero_()
        return self._buffers.pop(bucket)

    @property
    def contributed(self) -> list[bool]:
        """For each parameter, whether a gradient has come since the start of what is gathered."""
        return [index in self._filled for index in range(len(self._plan.parameters))]

    def _buffer(self, bucket: int) -> Tensor:
        if bucket not in self._buffers:
            numel = self._world_size * self._layout.shard_numel(bucket)
            self._buffers[bucket] = torch.empty(numel, dtype=self._dtype, device=self._device)
        return self._buffers[bucket]


class Gathering:
    """The gradients of a rank, from parameters to buckets that are handed to the pipeline: each micro-step's, or where
    the rank adds up its micro-steps the window's, each row's apart.

    Args:
        micro: where the run stands.
        layout: of the buckets in the exchange.
        dtype: in which gradients are added up.
        wire_dtype: in which they are exchanged.
        device: where they lie.
    """

    def __init__(
        self,
        micro: MicroStep,
        layout: Layout,
        dtype: torch.dtype,
        wire_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        moo = micro.moo
        self._micro = micro
        self._wire_dtype = wire_dtype
        self._make_staging = functools.partial(Staging, moo.plan, layout, moo.exchange.world_size, dtype, device)
        self._release = Release(len(moo.plan.buckets), moo.exchange, self._leave)
        self._staging = self._make_staging()
        self._sums: dict[Row, Staging] = {}
        self._part = 0

    def start_window(self) -> None:
        """Forgets all gradients."""
        self._staging.start_window()
        self._sums.clear()
        self._release.start()

    def begin(self) -> None:
        """A micro-step begins."""
        micro, window = self._micro, self._micro.moo.window
        self._release.start()
        if not window.once_a_window:
            self._staging.start_window()
            self._leaves = True
            return
        row = micro.slot.row
        if micro.first:
            self._sums.clear()
        if row not in self._sums:
            self._sums[row] = self._make_staging()
        self._staging = self._sums[row]
        self._staging.start_micro_step()
        mine = window.rows_of(micro.moo.exchange.rank)
        self._leaves = micro.boundary and window.parts == 1 and mine in ([], [row])

    def add(self, parameter: int, gradient: Tensor) -> None:
        """Takes the gradient of a parameter of the plan; complete buckets leave when it is their turn.

        Raises:
            BucketMOOError: the parameter's bucket has left already.
        """
        if self._release.has_left(self._staging.bucket_of(parameter)):
            raise BucketMOOError(
                f'parameter "{self._micro.moo.plan.parameters[parameter].name}" got a second gradient in one backward '
                "after its bucket was exchanged (a parameter that is used inside and outside of reentrant "
                "checkpointing does that); use torch.utils.checkpoint with use_reentrant=False"
            )
        factor = self._micro.factor if self._micro.slot.target_tokens else 0.0
        if self._staging.add(parameter, gradient, factor) and self._leaves:
            self._release.complete(self._staging.bucket_of(parameter))

    def end(self) -> list[bool]:
        """Hands over what is left of the micro-step; returns for each parameter whether a gradient has come."""
        stagings = list(self._sums.values()) or [self._staging]
        contributed = [any(of_one) for of_one in zip(*(each.contributed for each in stagings), strict=True)]
        if self._leaves:
            self._release.finish()
        elif self._micro.boundary:
            self._leave_by_row()
        return contributed

    def has_come(self, parameter: int) -> bool:
        """Whether a gradient of the parameter has come in this micro-step."""
        return self._staging.has_come(parameter)

    def _leave_by_row(self) -> None:
        """Exchanges one row after the other; a rank that has fewer of them than others goes on with zeros."""
        window = self._micro.moo.window
        rows = window.rows_of(self._micro.moo.exchange.rank)
        for self._part in range(window.parts):
            mine = self._part < len(rows)
            self._staging = self._sums[rows[self._part]] if mine else self._make_staging()
            self._release.start()
            self._release.finish()
        self._part = 0

    def _leave(self, bucket: int) -> None:
        self._micro.moo.ingest(bucket, self._staging.take(bucket).to(self._wire_dtype), self._part)
