"""The tables by which a shard is dealt to a GPU: nothing is left out, nothing taken twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bucketmoo_ds.ops.backends.tiles import aligned_tile_tables, run_table, tile_table

BLOCKS = 4


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [0, 3, 7])
def test_aligned_and_ragged_tiles_cover_every_element_once(generator: torch.Generator, shift: int) -> None:
    spans, blocks, elements = _segments(generator)
    aligned, ragged = aligned_tile_tables(spans, blocks, BLOCKS, elements, 96, 16, shift)
    seen = torch.full((elements,), -2)
    for table, first, inside in (aligned, ragged):
        assert int(first[-1]) == inside
        for start, length, block in table.tolist():
            assert 1 <= length <= 96
            assert (seen[start : start + length] == -2).all()
            seen[start : start + length] = block
        for block in range(BLOCKS):
            assert (table[first[block] : first[block + 1], 2] == block).all()
    assert torch.equal(seen, _owners(spans, blocks, elements))
    assert ((aligned[0][:, 0] - shift) % 16 == 0).all()
    assert (aligned[0][:, 1] % 16 == 0).all()
    # No more than a head, a tail, or what has no 16 elements in line, of each segment and of each gap.
    assert int(ragged[0][:, 1].max()) < 31
    assert len(ragged[0]) <= 2 * (2 * len(spans) + 1)


@pytest.mark.parametrize("parts", [1, 5, 100])
def test_runs_take_every_tile_once_and_keep_to_a_block(generator: torch.Generator, parts: int) -> None:
    spans, blocks, elements = _segments(generator)
    table, first_tile, _ = tile_table(spans, blocks, BLOCKS, elements, 50)
    runs, first = run_table(table, BLOCKS, parts)
    position = 0
    for begin, end, block in runs.tolist():
        assert begin == position < end
        assert (table[begin:end, 2] == block).all()
        position = end
    assert position == len(table)
    # A run ends where a part or a block does.
    assert len(runs) <= parts + BLOCKS
    for block in range(BLOCKS):
        tiles = torch.cat([torch.arange(begin, end) for begin, end, owner in runs.tolist() if owner == block])
        assert torch.equal(tiles, torch.arange(int(first_tile[block]), int(first_tile[block + 1])))
        assert (runs[first[block] : first[block + 1], 2] == block).all()
    assert (runs[int(first[-1]) :, 2] == -1).all()


def test_runs_share_the_work_evenly() -> None:
    spans = torch.tensor([[0, 1_000_000]])
    table, _, _ = tile_table(spans, torch.tensor([0]), 1, 1_000_000, 1000)
    runs, _ = run_table(table, 1, 32)
    tiles = runs[:, 1] - runs[:, 0]
    assert len(runs) == 32
    # 1000 tiles of equal size among 32.
    assert set(tiles.tolist()) <= {31, 32}


def _segments(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Segments of every block, some short, some empty, with gaps and without, in any order of blocks."""
    lengths = [0, 1, 1, 5, 15, 16, 17, 300, 1000, 64, 1, 333, 0]
    lengths = [lengths[index] for index in torch.randperm(len(lengths), generator=generator).tolist()]
    spans, position = [], 0
    for length in lengths:
        position += max(0, int(torch.randint(-5, 40, (), generator=generator)))
        spans.append([position, length])
        position += length
    blocks = torch.randint(BLOCKS, (len(lengths),), generator=generator)
    longest = torch.tensor(lengths).argsort(descending=True)[:BLOCKS]
    blocks[longest] = torch.randperm(BLOCKS, generator=generator)
    return torch.tensor(spans), blocks, position + int(torch.randint(40, (), generator=generator))


def _owners(spans: Tensor, blocks: Tensor, elements: int) -> Tensor:
    owner = torch.full((elements,), -1)
    for (start, length), block in zip(spans.tolist(), blocks.tolist(), strict=True):
        owner[start : start + length] = block
    return owner
