"""The readable definition of the ops: torch, float64 in chunks. Every faster backend is held against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds.ops.backends.min_norm import min_norm

__all__ = ["accumulate_gram", "combine", "gram", "min_norm", "resolve", "unavailable"]

# Elements of one row that are widened to float64 at a time: K such chunks stay within a core's cache.
CHUNK = 1 << 15

DEVICES: tuple[str, ...] = ()
PRIORITY = 0


def unavailable(device: torch.device) -> str:
    """It runs on every device."""
    return ""


def gram(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """See `bucketmoo_ds.ops.gram`."""
    count = len(rows)
    total = torch.zeros(num_cells, count, count, dtype=torch.float64, device=rows[0].device)
    for (start, length), cell in zip(spans.tolist(), cells.tolist(), strict=True):
        for begin in range(start, start + length, CHUNK):
            chunk = _wide(rows, begin, min(begin + CHUNK, start + length))
            total[cell] += chunk @ chunk.T
    # A matrix product may round (i, j) and (j, i) differently; the lower triangle is the Gram.
    return total.tril() + total.tril(-1).transpose(1, 2)


def accumulate_gram(
    rows: Sequence[Tensor],
    incoming: Tensor,
    targets: Sequence[int],
    scales: Sequence[float],
    fresh: Sequence[bool],
    spans: Tensor,
    cells: Tensor,
    num_cells: int,
) -> Tensor:
    """See `bucketmoo_ds.ops.accumulate_gram`."""
    void = {row for row, is_void in enumerate(fresh) if is_void}
    for arrived, target, scale in zip(incoming, targets, scales, strict=True):
        if target < 0:
            continue
        row, gradient = rows[target], arrived.float()
        if target in void:
            void.remove(target)
            row.copy_(gradient).mul_(scale)
        else:
            # A fused multiply-add: the product is exact in float64, and there is one rounding, to float32.
            for begin in range(0, row.numel(), CHUNK):
                part = row[begin : begin + CHUNK]
                part.copy_(gradient[begin : begin + CHUNK].double() * _float32(scale) + part)
    return gram(rows, spans, cells, num_cells)


def combine(rows: Sequence[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor) -> None:
    """See `bucketmoo_ds.ops.combine`."""
    used = weights.tolist()
    position = 0
    for (start, length), cell in zip(spans.tolist(), cells.tolist(), strict=True):
        out[position:start].zero_()
        position = start + length
        chosen = [index for index, weight in enumerate(used[cell]) if weight != 0.0]
        if not chosen:
            out[start:position].zero_()
            continue
        weight = weights[cell, chosen].to(device=out.device, dtype=torch.float64)
        for begin in range(start, position, CHUNK):
            end = min(begin + CHUNK, position)
            out[begin:end] = weight @ _wide([rows[index] for index in chosen], begin, end)
    out[position:].zero_()


def resolve(
    rows: Sequence[Tensor], mask: Tensor, max_weight: float, spans: Tensor, cells: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bucketmoo_ds.ops.resolve`."""
    grams = gram(rows, spans, cells, mask.shape[0])
    weights, finite = min_norm(grams, mask, max_weight)
    combine(rows, weights, spans, cells, out)
    return grams, weights, finite


def _float32(scale: float) -> float:
    return float(torch.tensor(scale, dtype=torch.float32))


def _wide(rows: Sequence[Tensor], begin: int, end: int) -> Tensor:
    wide = torch.empty(len(rows), end - begin, dtype=torch.float64, device=rows[0].device)
    for index, row in enumerate(rows):
        wide[index] = row[begin:end]
    return wide
