"""Layouts: every element of every parameter has one place, the rest is padding, and segments say whose place it is."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds.plan.blocks import BlockPlan, Parameter, plan_blocks
from bucketmoo_ds.plan.layout import Chunked, Consecutive, Layout

UNWRITTEN, PADDING = -2, -1


class Drawn(NamedTuple):
    plan: BlockPlan
    world_size: int
    layout: Layout

    def ids(self, parameter: int) -> Tensor:
        """A number for each of its elements that no other element of the model has."""
        numels = [each.numel for each in self.plan.parameters]
        return torch.arange(sum(numels)).split(numels)[parameter]

    def buffer(self, bucket: int) -> Tensor:
        """`[W, S]`, written through the layout."""
        flat = torch.full((self.world_size * self.layout.shard_numel(bucket),), UNWRITTEN)
        for member, index in enumerate(self.plan.buckets[bucket].parameters):
            for target, start, numel in self.layout.parts(flat, bucket, member):
                assert (target == UNWRITTEN).all(), "two elements have one place"
                target.copy_(self.ids(index).narrow(0, start, numel).view_as(target))
        for padding in self.layout.padding(flat, bucket):
            assert (padding == UNWRITTEN).all(), "padding where an element lies"
            padding.fill_(PADDING)
        return flat.view(self.world_size, -1)


def chunk_of(numel: int, world_size: int) -> int:
    """DeepSpeed's partition size: its `partition_numel` rounds up."""
    return (numel + world_size - 1) // world_size


def chunked(plan: BlockPlan, world_size: int) -> Chunked:
    return Chunked(plan, world_size, [chunk_of(each.numel, world_size) for each in plan.parameters])


@st.composite
def drawn(draw: st.DrawFn, kind: str) -> Drawn:
    numels = draw(st.lists(st.one_of(st.integers(1, 6), st.integers(7, 60)), min_size=1, max_size=9))
    plan = plan_blocks(
        [Parameter(f"layers.{index // 2}.p{index}", numel) for index, numel in enumerate(numels)],
        draw(st.sampled_from([1, 15, 40, 10**9])),
        draw(st.sampled_from(["bucket", "parameter", "layer", "model"])),
    )
    world_size = draw(st.integers(1, 6))
    if kind == "chunked":
        return Drawn(plan, world_size, chunked(plan, world_size))
    spare = draw(st.integers(0, 9))
    shards = [chunk_of(bucket.numel, world_size) + spare for bucket in plan.buckets]
    return Drawn(plan, world_size, Consecutive(plan, shards))


any_layout = st.one_of(drawn("chunked"), drawn("consecutive"))


@settings(deadline=None)
@given(case=any_layout)
def test_every_element_has_one_place_and_the_rest_is_padding(case: Drawn) -> None:
    for number, bucket in enumerate(case.plan.buckets):
        found = case.buffer(number).flatten()
        assert (found != UNWRITTEN).all(), "neither an element nor padding"
        wanted = torch.cat([case.ids(index) for index in bucket.parameters])
        assert torch.equal(found[found != PADDING].sort().values, wanted)


@settings(deadline=None)
@given(case=drawn("chunked"))
def test_a_shard_is_the_chunks_that_ceil_division_gives(case: Drawn) -> None:
    assert isinstance(case.layout, Chunked)
    for number, bucket in enumerate(case.plan.buckets):
        rows = case.buffer(number)
        for rank, row in enumerate(rows):
            expected = []
            for index in bucket.parameters:
                chunk = chunk_of(case.plan.parameters[index].numel, case.world_size)
                mine = case.ids(index)[rank * chunk : (rank + 1) * chunk]  # short or empty at the end
                expected.append(torch.cat([mine, torch.full((chunk - len(mine),), PADDING)]))
            assert torch.equal(row, torch.cat(expected))
            for found, wanted in zip(case.layout.chunks(number, row), expected, strict=True):
                assert torch.equal(found, wanted)


@settings(deadline=None)
@given(case=drawn("consecutive"))
def test_consecutive_shards_are_slices_of_the_parameters_in_a_row(case: Drawn) -> None:
    for number, bucket in enumerate(case.plan.buckets):
        wanted = torch.cat([case.ids(index) for index in bucket.parameters])
        assert torch.equal(case.buffer(number).flatten()[: bucket.numel], wanted)


@settings(deadline=None)
@given(case=any_layout)
def test_segments_agree_with_parts(case: Drawn) -> None:
    """Every element lies in one segment, of its parameter's block; padding may lie in one, for it is zero."""
    block_of = torch.cat(
        [torch.full((each.numel,), block) for each, block in zip(case.plan.parameters, case.plan.block_of, strict=True)]
    )
    for number in range(len(case.plan.buckets)):
        cells = case.plan.cells_of(number)
        for rank, row in enumerate(case.buffer(number)):
            segments = case.layout.segments(number, rank)
            assert segments.num_cells == len(cells)
            blocks = torch.full_like(row, UNWRITTEN)
            for (start, length), cell in zip(segments.spans.tolist(), segments.cells.tolist(), strict=True):
                assert length > 0
                assert start + length <= len(row)
                assert (blocks[start : start + length] == UNWRITTEN).all(), "two segments overlap"
                blocks[start : start + length] = case.plan.cell_block[cells[cell]]
            elements = row != PADDING
            assert torch.equal(blocks[elements], block_of[row[elements]])
            starts = segments.spans[:, 0].tolist()
            assert starts == sorted(starts)


def test_parts_are_views_of_few_pieces() -> None:
    """A parameter is at most two copies: its whole chunks, and a short one."""
    plan = plan_blocks([Parameter("p", 10), Parameter("q", 8), Parameter("r", 1)], 100, "bucket")
    layout = chunked(plan, 4)
    flat = torch.zeros(4 * layout.shard_numel(0))
    parts = [[tuple(part.target.shape) for part in layout.parts(flat, 0, member)] for member in range(3)]
    # 10 = 3 + 3 + 3 + 1; 8 = 2 + 2 + 2 + 2; 1 = 1 + 0 + 0 + 0
    assert parts == [[(3, 3), (1,)], [(4, 2)], [(1, 1)]]
    layout.parts(flat, 0, 1)[0].target.fill_(7.0)
    assert int(flat.sum()) == 8 * 7
    assert sum(padding.numel() for padding in layout.padding(flat, 0)) == 4 * (3 + 2 + 1) - 10 - 8 - 1


@pytest.mark.parametrize("kind", ["chunked", "consecutive"])
def test_one_rank_alone_has_no_padding(kind: str) -> None:
    plan = plan_blocks([Parameter("p", 5), Parameter("q", 3)], 100, "parameter")
    layout = chunked(plan, 1) if kind == "chunked" else Consecutive(plan, [8])
    case = Drawn(plan, 1, layout)
    assert torch.equal(case.buffer(0), torch.arange(8).view(1, 8))
    assert layout.segments(0, 0).spans.tolist() == [[0, 5], [5, 3]]
