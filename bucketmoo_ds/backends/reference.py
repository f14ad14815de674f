"""The readable definition of the ops: torch, float64 in chunks. Every faster backend is held against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of one row that are widened to float64 at a time: K such chunks stay within a core's cache.
CHUNK = 1 << 15


def gram(rows: Sequence[Tensor], spans: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """See `bucketmoo_ds.ops.gram`."""
    count = len(rows)
    total = torch.zeros(num_blocks, count, count, dtype=torch.float64, device=rows[0].device)
    for (start, length), block in zip(spans.tolist(), blocks.tolist(), strict=True):
        for begin in range(start, start + length, CHUNK):
            chunk = _wide(rows, begin, min(begin + CHUNK, start + length))
            total[block] += chunk @ chunk.T
    # A matrix product may round (i, j) and (j, i) differently; the lower triangle is the Gram.
    return total.tril() + total.tril(-1).transpose(1, 2)


def combine(rows: Sequence[Tensor], weights: Tensor, spans: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """See `bucketmoo_ds.ops.combine`."""
    used = weights.tolist()
    position = 0
    for (start, length), block in zip(spans.tolist(), blocks.tolist(), strict=True):
        out[position:start].zero_()
        position = start + length
        chosen = [index for index, weight in enumerate(used[block]) if weight != 0.0]
        if not chosen:
            out[start:position].zero_()
            continue
        weight = weights[block, chosen].to(device=out.device, dtype=torch.float64)
        for begin in range(start, position, CHUNK):
            end = min(begin + CHUNK, position)
            out[begin:end] = weight @ _wide([rows[index] for index in chosen], begin, end)
    out[position:].zero_()
    return out


def _wide(rows: Sequence[Tensor], begin: int, end: int) -> Tensor:
    wide = torch.empty(len(rows), end - begin, dtype=torch.float64, device=rows[0].device)
    for index, row in enumerate(rows):
        wide[index] = row[begin:end]
    return wide
