"""Where a bucket's parameters lie in the buffer that is exchanged, `[W, S]`: row j is rank j's shard."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from bucketmoo_ds.plan.blocks import BlockPlan, Run, Segments


class Part(NamedTuple):
    """A view of the buffer, and which elements of the flat parameter belong there: the first, and how many."""

    target: Tensor
    start: int
    numel: int


class Layout(Protocol):
    """How a framework cuts buckets into shards."""

    def shard_numel(self, bucket: int) -> int:
        """Returns S."""

    def parts(self, buffer: Tensor, bucket: int, member: int) -> list[Part]:
        """Returns the places of the bucket's `member`-th parameter."""

    def padding(self, buffer: Tensor, bucket: int) -> list[Tensor]:
        """Returns views of what belongs to no parameter."""

    def segments(self, bucket: int, rank: int) -> Segments:
        """Returns the segments of a rank's shard."""


class Consecutive:
    """The parameters one after the other, and that cut into even slices.

    Args:
        shard_numels: S of every bucket; `W S` is at least the bucket's size.
    """

    def __init__(self, plan: BlockPlan, shard_numels: Sequence[int]) -> None:
        self._plan = plan
        self._shards = shard_numels

    def shard_numel(self, bucket: int) -> int:
        """See `Layout`."""
        return self._shards[bucket]

    def parts(self, buffer: Tensor, bucket: int, member: int) -> list[Part]:
        """See `Layout`."""
        members = self._plan.buckets[bucket]
        numel = self._plan.parameters[members.parameters[member]].numel
        return [Part(buffer.narrow(0, members.offsets[member], numel), 0, numel)]

    def padding(self, buffer: Tensor, bucket: int) -> list[Tensor]:
        """See `Layout`."""
        return [buffer[self._plan.buckets[bucket].numel :]]

    def segments(self, bucket: int, rank: int) -> Segments:
        """See `Layout`."""
        numel = self._shards[bucket]
        return self._plan.segments(bucket, rank * numel, (rank + 1) * numel)


class Chunked:
    """Every parameter cut into W chunks; a shard is one chunk of each, the last ones short or empty and padded.

    Args:
        world_size: W.
        chunks: elements of a chunk of each of the plan's parameters.
    """

    def __init__(self, plan: BlockPlan, world_size: int, chunks: Sequence[int]) -> None:
        self._plan = plan
        self._world_size = world_size
        self._chunks = [[chunks[index] for index in bucket.parameters] for bucket in plan.buckets]
        self._starts = [list(itertools.accumulate(of_bucket, initial=0)) for of_bucket in self._chunks]

    def shard_numel(self, bucket: int) -> int:
        """See `Layout`."""
        return self._starts[bucket][-1]

    def chunks(self, bucket: int, shard: Tensor) -> list[Tensor]:
        """Returns a shard's chunk of every parameter of the bucket, padding included."""
        return list(shard.split(self._chunks[bucket]))

    def parts(self, buffer: Tensor, bucket: int, member: int) -> list[Part]:
        """See `Layout`."""
        columns, whole, rest = self._columns(buffer, bucket, member)
        chunk = columns.size(1)
        parts = [Part(columns[:whole], 0, whole * chunk)] if whole else []
        return parts + ([Part(columns[whole, :rest], whole * chunk, rest)] if rest else [])

    def padding(self, buffer: Tensor, bucket: int) -> list[Tensor]:
        """See `Layout`."""
        views = []
        for member in range(len(self._chunks[bucket])):
            columns, whole, rest = self._columns(buffer, bucket, member)
            views += [columns[whole, rest:], columns[whole + 1 :]] if whole < self._world_size else []
        return views

    def _columns(self, buffer: Tensor, bucket: int, member: int) -> tuple[Tensor, int, int]:
        """A parameter's columns `[W, chunk]` of the buffer, its whole chunks, and the elements of a short one."""
        numel = self._plan.parameters[self._plan.buckets[bucket].parameters[member]].numel
        start, chunk = self._starts[bucket][member], self._chunks[bucket][member]
        return buffer.view(self._world_size, -1)[:, start : start + chunk], *divmod(numel, chunk)

    def segments(self, bucket: int, rank: int) -> Segments:
        """See `Layout`."""
        members = zip(self._plan.buckets[bucket].parameters, self._starts[bucket], self._chunks[bucket], strict=False)
        return self._plan.segments_of(bucket, [Run(*member) for member in members], 0, self.shard_numel(bucket))
