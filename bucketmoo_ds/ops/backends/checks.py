"""What every backend may rely on. The compiled ones read memory at the addresses they are given: nothing is assumed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds.ops.backends.segments import kept

MAX_ROWS = 64  # that a backend takes; more go to it in groups (bucketmoo_ds.ops.groups)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_rows(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> None:
    """Raises a ValueError unless rows and segments fit together (see `bucketmoo_ds.ops.gram`)."""
    _check(len(rows) >= 1, "no rows: expected at least one")
    first = rows[0]
    _check(first.dtype in DTYPES, f"rows of {first.dtype}: expected one of {', '.join(map(str, DTYPES))}")
    _check_like("row", rows, first, first.dtype)
    elements = first.numel()
    kept(spans, cells, ("fits", elements, num_cells), lambda: _check_segments(spans, cells, num_cells, elements))


def _check_segments(spans: Tensor, cells: Tensor, num_cells: int, elements: int) -> None:
    for name, table, shape in (("spans", spans, (len(cells), 2)), ("cells", cells, (len(cells),))):
        fits = table.dtype == torch.int64 and table.device.type == "cpu" and tuple(table.shape) == shape
        _check(
            fits and table.is_contiguous(),
            f"{name}: {table.dtype} {list(table.shape)} on {table.device}: "
            f"expected contiguous torch.int64 {list(shape)} on the CPU",
        )
    if len(cells) == 0:
        return
    starts, lengths = spans.unbind(1)
    ends = starts + lengths
    ascending = bool((starts[1:] >= ends[:-1]).all()) and int(starts[0]) >= 0 and int(lengths.min()) >= 0
    _check(ascending, "spans: expected ascending segments of length 0 or more, none overlapping")
    _check(int(ends[-1]) <= elements, f"spans: end at {int(ends[-1])}, beyond the rows' {elements} elements")
    low, high = (int(bound) for bound in cells.aminmax())
    _check(low >= 0 and high < num_cells, f"cells: {low} to {high}: expected 0 to {num_cells - 1}")


def check_incoming(
    rows: Sequence[Tensor],
    incoming: Tensor,
    targets: Sequence[int],
    scales: Sequence[float],
    fresh: Sequence[bool],
) -> None:
    """Raises a ValueError unless the gradients fit the rows (see `bucketmoo_ds.ops.accumulate_gram`)."""
    _check(rows[0].dtype == torch.float32, f"rows of {rows[0].dtype}: expected torch.float32 to accumulate into")
    fits = incoming.dim() == 2 and incoming.shape[1] == rows[0].numel() and incoming.device == rows[0].device
    _check(
        fits and incoming.dtype in DTYPES and (incoming.shape[1] < 2 or incoming.stride(1) == 1),
        f"incoming gradients: {incoming.dtype} {list(incoming.shape)} on {incoming.device}: expected [P, "
        f"{rows[0].numel()}] on {rows[0].device}, of {', '.join(map(str, DTYPES))}, each contiguous",
    )
    _check(
        len(incoming) == len(targets) == len(scales),
        f"{len(incoming)} incoming gradients, {len(targets)} targets, {len(scales)} scales: expected as many",
    )
    _check(len(fresh) == len(rows), f"fresh: {len(fresh)} values: expected one for each of the {len(rows)} rows")
    given = set(targets)
    _check(given <= set(range(-1, len(rows))), f"targets: expected -1 to {len(rows) - 1}")
    void = [row for row in range(len(rows)) if fresh[row] and row not in given]
    _check(not void, f"fresh: row {void[0] if void else ''} is void and has no incoming gradient")


def check_combine(rows: Sequence[Tensor], weights: Tensor, out: Tensor) -> None:
    """Raises a ValueError unless weights (or a mask) `[C, K]` and `out` fit the rows."""
    fits = weights.dim() == 2 and weights.shape[1] == len(rows)
    _check(fits, f"weights or mask: {list(weights.shape)}: expected [C, {len(rows)}]")
    if weights.dtype != torch.bool:
        _check(weights.dtype == torch.float64, f"weights: {weights.dtype}: expected torch.float64")
    _check(out.dtype in DTYPES, f"out: {out.dtype}: expected one of {', '.join(map(str, DTYPES))}")
    _check_like("out", [out], rows[0], out.dtype)
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    for index, row in enumerate(rows):
        apart = row.data_ptr() + row.nbytes <= begin or end <= row.data_ptr()
        same = row.data_ptr() == begin and row.dtype == out.dtype
        _check(apart or same, f"out overlaps row {index} without being it")


def check_min_norm(gram: Tensor | None, mask: Tensor, max_weight: float) -> None:
    """Raises a ValueError unless Gram, mask and cap fit together (see `bucketmoo_ds.ops.min_norm`)."""
    _check(
        mask.dtype == torch.bool and mask.dim() == 2 and mask.shape[1] >= 1,
        f"mask: {mask.dtype} {list(mask.shape)}: expected torch.bool [B, K] with K at least 1",
    )
    _check(0.0 < max_weight <= 1.0, f"max_weight = {max_weight}: expected more than 0 and at most 1")
    if gram is not None:
        shape = (*mask.shape, mask.shape[1])
        fits = gram.dtype == torch.float64 and gram.shape == shape and gram.device == mask.device
        _check(
            fits,
            f"gram: {gram.dtype} {list(gram.shape)} on {gram.device}: "
            f"expected torch.float64 {list(shape)} on {mask.device}",
        )


def _check_like(name: str, tensors: Sequence[Tensor], first: Tensor, dtype: torch.dtype) -> None:
    numel, device = first.numel(), first.device
    for index, each in enumerate(tensors):
        like = each.dtype == dtype and each.numel() == numel and each.device == device
        if not (like and each.dim() == 1 and each.is_contiguous()):
            number = f" {index}" if len(tensors) > 1 else ""
            raise ValueError(
                f"{name}{number}: {each.dtype} {list(each.shape)} on {each.device}: "
                f"expected contiguous {dtype} [{numel}] on {device}"
            )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
