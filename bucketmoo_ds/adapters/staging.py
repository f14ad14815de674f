"""Gathers the gradients that autograd delivers one by one into the plan's buckets.

Buckets leave in the plan's order, each exactly once a micro-step, whatever order gradients come in and whichever are
missing: so every rank starts the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.plan.blocks import BlockPlan
from bucketmoo_ds.plan.layout import Layout


class Staging:
    """Flat buffers of the buckets of one micro-step, or (ZeRO-1) of one window.

    Args:
        plan: the buckets.
        layout: of a bucket's buffer, `[W * S]`; the padding is zero.
        world_size: W.
        dtype: dtype in which gradients are added up and exchanged.
        device: where the buffers lie.
        release: called with (bucket, flat buffer) when a bucket leaves; the buffer then belongs to the callee.
    """

    def __init__(
        self,
        plan: BlockPlan,
        layout: Layout,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
        release: Callable[[int, Tensor], None],
    ) -> None:
        self._plan = plan
        self._layout = layout
        self._world_size = world_size
        self._dtype = dtype
        self._device = device
        self._release = release
        self._place = {
            index: (number, member)
            for number, bucket in enumerate(plan.buckets)
            for member, index in enumerate(bucket.parameters)
        }
        self._buffers: dict[int, Tensor] = {}
        self.start_window()

    def start_window(self) -> None:
        """Forgets all gradients."""
        self._buffers.clear()
        self._filled: set[int] = set()
        self.start_micro_step()

    def start_micro_step(self) -> None:
        """Expects every parameter once more; gradients that are still here are added to."""
        self._arrived: set[int] = set()
        self._waiting = [len(bucket.parameters) for bucket in self._plan.buckets]
        self._next = 0

    def add(self, parameter: int, gradient: Tensor, factor: float) -> None:
        """Adds `factor * gradient` to its place.

        Raises:
            BucketMOOError: the parameter's bucket has left already.
        """
        bucket, member = self._place[parameter]
        if bucket < self._next:
            raise BucketMOOError(
                f'parameter "{self._plan.parameters[parameter].name}" got a second gradient in one backward after its '
                "bucket was exchanged (a parameter that is used inside and outside of reentrant checkpointing does "
                "that); use torch.utils.checkpoint with use_reentrant=False"
            )
        flat = gradient.reshape(-1)
        for target, start, numel in self._layout.parts(self._buffer(bucket), bucket, member):
            source = flat.narrow(0, start, numel).view_as(target)
            if parameter in self._filled:
                target.add_(source, alpha=factor)
            else:
                target.copy_(source)
                if factor != 1.0:
                    target.mul_(factor)
        self._filled.add(parameter)
        if parameter not in self._arrived:
            self._arrived.add(parameter)
            self._waiting[bucket] -= 1

    def release_complete(self) -> None:
        """Lets go of the buckets whose turn it is and whose gradients have all come."""
        while self._next < len(self._waiting) and self._waiting[self._next] == 0:
            self._leave()

    def release_all(self) -> None:
        """Lets go of all buckets that are left; parameters without a gradient count as zero."""
        while self._next < len(self._waiting):
            self._leave()

    @property
    def contributed(self) -> list[bool]:
        """For each parameter, whether a gradient came since the window's (ZeRO-1) or micro-step's (ZeRO-2) start."""
        return [index in self._filled for index in range(len(self._plan.parameters))]

    def _leave(self) -> None:
        bucket = self._next
        self._next += 1
        flat = self._buffer(bucket)
        for member, index in enumerate(self._plan.buckets[bucket].parameters):
            if index not in self._filled:
                for part in self._layout.parts(flat, bucket, member):
                    part.target.zero_()
        for padding in self._layout.padding(flat, bucket):
            padding.zero_()
        self._release(bucket, self._buffers.pop(bucket))

    def _buffer(self, bucket: int) -> Tensor:
        if bucket not in self._buffers:
            numel = self._world_size * self._layout.shard_numel(bucket)
            self._buffers[bucket] = torch.empty(numel, dtype=self._dtype, device=self._device)
        return self._buffers[bucket]
