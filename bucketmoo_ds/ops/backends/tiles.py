"""How the backends of a GPU cut a shard into pieces of work: tiles of elements, and runs of tiles.

Tiles are sorted by cell, and their order is that of the sums, so that these are the same from run to run. Segments
stay the same from step to step: their tables are made, and copied to the device, once (`tiles_on_device`).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor


def tile_table(
    spans: Tensor, cells: Tensor, num_cells: int, elements: int, tile: int
) -> tuple[Tensor, Tensor, int]:
    """Cuts the segments of a shard, and what lies between them, into tiles.

    Args:
        spans, cells, num_cells: as in `bucketmoo_ds.ops.gram`.
        elements: S.
        tile: elements of the longest tile.

    Returns:
        table: `[T, 3]` int64 on the CPU: start, length (at least 1) and cell of each tile, sorted by cell, then by
            start; those outside of all segments have cell -1 and stand at the end.
        first: `[C + 1]` int64: where each cell's tiles begin.
        inside: how many tiles lie in a segment.
    """
    return _cut(*_with_gaps(spans, cells, num_cells, elements), num_cells, tile)


def aligned_tile_tables(
    spans: Tensor, cells: Tensor, num_cells: int, elements: int, tile: int, multiple: int, shift: int
) -> tuple[tuple[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]:
    """Returns two tables as `tile_table` does: one of tiles that begin and end at `shift` plus multiples of `multiple`
    elements, and one of the ragged rest, less than that at either end of a segment. `tile` is a multiple of it too."""
    starts, lengths, owners = _with_gaps(spans, cells, num_cells, elements)
    ends = starts + lengths
    begin = ((starts - shift + multiple - 1) // multiple * multiple + shift).minimum(ends)
    end = ((ends - shift) // multiple * multiple + shift).maximum(begin)
    # What contains no whole multiple is all ragged.
    begin = torch.where(begin < end, begin, ends)
    end = torch.where(begin < end, end, ends)
    ragged = torch.cat([starts, end]), torch.cat([begin - starts, ends - end]), torch.cat([owners, owners])
    return _cut(begin, end - begin, owners, num_cells, tile), _cut(*ragged, num_cells, tile)


def run_table(table: Tensor, num_cells: int, parts: int) -> tuple[Tensor, Tensor]:
    """Gathers tiles into about as many runs as `parts`, of about equal work, each of consecutive tiles of one cell.

    Args:
        table: as of `tile_table`.
        num_cells: C.
        parts: a run has about a `parts`-th of all elements, or fewer where its cell ends, or is a single tile.

    Returns:
        runs: `[R, 3]` int64 on the CPU: first tile, last tile + 1 and cell of each run, in the order of the tiles.
        first: `[C + 1]` int64: where each cell's runs begin; the last entry is where those outside of all segments do.
    """
    if len(table) == 0:
        return torch.empty(0, 3, dtype=torch.int64), torch.zeros(num_cells + 1, dtype=torch.int64)
    work = table[:, 1] + _ELEMENTS_A_TILE_COSTS
    before = work.cumsum(0) - work
    part = before * parts // int(work.sum())
    owners = torch.where(table[:, 2] < 0, num_cells, table[:, 2])
    fresh = torch.ones(len(table), dtype=torch.bool)
    fresh[1:] = (part[1:] != part[:-1]) | (owners[1:] != owners[:-1])
    begin = fresh.nonzero().squeeze(1)
    end = torch.cat([begin[1:], torch.tensor([len(table)])])
    first = torch.searchsorted(owners[begin], torch.arange(num_cells + 1))
    return torch.stack([begin, end, table[begin, 2]], dim=1), first


# Segments stay the same from step to step; their tables are copied to the device once.
@functools.lru_cache(maxsize=256)
def tiles_on_device(
    spans: bytes, cells: bytes, num_cells: int, elements: int, tile: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Returns `tile_table` on a device, of spans and cells as bytes (`bytes_of`)."""
    table, first, inside = tile_table(*segments_of(spans, cells), num_cells, elements, tile)
    return table.to(device), first.to(device), inside


def bytes_of(tensor: Tensor) -> bytes:
    """Returns the elements of a tensor on the CPU as bytes; torch can be installed without numpy."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def segments_of(spans: bytes, cells: bytes) -> tuple[Tensor, Tensor]:
    """Returns the `[n, 2]` spans and the `[n]` cells that these bytes are."""
    owners = torch.frombuffer(bytearray(cells), dtype=torch.int64) if cells else torch.empty(0, dtype=torch.int64)
    segments = torch.frombuffer(bytearray(spans), dtype=torch.int64) if spans else torch.empty(0, dtype=torch.int64)
    return segments.view(-1, 2), owners


# What a tile costs apart from its elements, in elements: a few reads that wait for each other.
_ELEMENTS_A_TILE_COSTS = 256


def _with_gaps(spans: Tensor, cells: Tensor, num_cells: int, elements: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns starts, lengths and cells of the segments, and of what lies between them, of cell `num_cells`."""
    starts, lengths = spans.unbind(1)
    edge = torch.zeros(1, dtype=torch.int64)
    gaps = torch.cat([edge, starts + lengths])
    starts = torch.cat([starts, gaps])
    lengths = torch.cat([lengths, torch.cat([spans[:, 0], edge + elements]) - gaps])
    return starts, lengths, torch.cat([cells, torch.full_like(gaps, num_cells)])


def _cut(starts: Tensor, lengths: Tensor, owners: Tensor, num_cells: int, tile: int) -> tuple[Tensor, Tensor, int]:
    owners, order = owners.sort(stable=True)
    starts, lengths = starts[order], lengths[order]
    pieces = (lengths + tile - 1) // tile
    source = torch.repeat_interleave(pieces)
    offset = (torch.arange(len(source)) - (pieces.cumsum(0) - pieces)[source]) * tile
    owner = owners[source]
    table = torch.stack([starts[source] + offset, (lengths[source] - offset).clamp(max=tile), owner], dim=1)
    first = torch.searchsorted(owner, torch.arange(num_cells + 1))
    inside = int(first[-1])
    table[inside:, 2] = -1
    return table, first, inside
