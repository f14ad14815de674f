"""How each kernel is launched, by op, dtype and number of rows: a plain table, no autotuning, which would need a device
to compile and would let ranks differ. `every_launch` lists all of it, to be compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bucketmoo_ds.kernels.accumulate import accumulate_kernel
from bucketmoo_ds.kernels.combine import combine_kernel
from bucketmoo_ds.kernels.gram import add_partials_kernel, gram_kernel
from bucketmoo_ds.kernels.min_norm import min_norm_kernel

ELEMENTS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
# Gradients that come in as float64 are converted first: nobody trains so, and each dtype takes 15 compilations.
INCOMING = (torch.float32, torch.bfloat16, torch.float16)
# K is padded to one of these: unrolled pairs of rows up to 8, `tl.dot` from 16 on.
ROWS = (4, 8, 16, 32, 64)
# The interpreter runs the kernels on the CPU; it is chosen when triton is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Shape:
    """`columns` elements of every row at a time, by `warps` warps; with `stages` - 1 loads ahead."""

    columns: int
    warps: int
    stages: int


# Pairs take 16 bytes of a row a thread, or one element where rows are not aligned.
_PAIRS = Shape(128, 4, 1)
# A float32 dot keeps its operands in registers, as the tensor cores do not: few columns, and more warps.
_DOT = {
    torch.bfloat16: {16: Shape(256, 4, 4), 32: Shape(256, 4, 3), 64: Shape(128, 8, 4)},
    torch.float16: {16: Shape(256, 4, 4), 32: Shape(256, 4, 3), 64: Shape(128, 8, 4)},
    torch.float32: {16: Shape(128, 4, 3), 32: Shape(64, 8, 3), 64: Shape(32, 8, 3)},
    torch.float64: {16: Shape(32, 4, 3), 32: Shape(32, 4, 3), 64: Shape(16, 8, 3)},
}
# Left to itself, ptxas spills a few registers to have more programs on a multiprocessor.
_ALL_REGISTERS = 255
_MIN_NORM_WARPS = {16: 1, 32: 4, 64: 8}
_COMBINE_WARPS = 4
_UPDATE_COLUMNS = 1024
_ADD_PARTIALS = (16, 4)  # partials at a time, warps


@dataclass(frozen=True)
class Launch:
    """A kernel with all that is known when it is compiled."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 1
    registers: int | None = None  # of a thread, at most

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        # Fused multiply-adds only where the kernels say so: which of two products a compiler would fuse is not known,
        # and need not be the same for every pair of rows.
        return {**options, "enable_fp_fusion": False}

    def __call__(self, grid: tuple[int, ...], *arguments: Tensor | int) -> None:
        """Enqueues it on the current stream of the arguments' device."""
        if all(grid):
            self.kernel[grid](*arguments, **self.constants, **self.options)


def gram(dtype: torch.dtype, count: int, aligned: bool) -> Launch:
    """Arguments: addresses, tiles, runs, partials, count. Grid: the runs inside of segments."""
    rows = _padded(count, ROWS)
    shape = _gram_shape(dtype, rows, aligned)
    constants = {"ELEMENT": ELEMENTS[dtype], **_gram_constants(rows, shape, aligned)}
    name = f"gram {_name(dtype)} {rows}{_ragged(aligned)}"
    return Launch(name, gram_kernel, constants, shape.warps, shape.stages, _ALL_REGISTERS)


def accumulate(incoming: torch.dtype, count: int, aligned: bool, incoming_aligned: bool) -> Launch:
    """Arguments: addresses, owners, updates, tiles, runs, partials, count. Grid: all runs."""
    rows = _padded(count, ROWS)
    # To the bit what `gram` gives: of the same shape.
    shape = _gram_shape(torch.float32, rows, aligned)
    constants = {
        "INCOMING": ELEMENTS[incoming],
        "INCOMING_ALIGNED": aligned and incoming_aligned,
        "WIDTH": _UPDATE_COLUMNS if aligned else shape.warps * 32,
        **_gram_constants(rows, shape, aligned),
    }
    name = f"accumulate {_name(incoming)} {rows}{_ragged(aligned)}"
    if aligned and not incoming_aligned:
        name += " from ragged"
    return Launch(name, accumulate_kernel, constants, shape.warps, shape.stages, _ALL_REGISTERS)


def add_partials(count: int) -> Launch:
    """Arguments: partials, first, gram, count, blocks, parts. Grid: blocks, count."""
    rows = _padded(count, ROWS)
    depth, warps = _ADD_PARTIALS
    return Launch(f"add partials {rows}", add_partials_kernel, {"ROWS": rows, "DEPTH": depth}, warps)


def min_norm(count: int) -> Launch:
    """Arguments: gram, mask, weights, finite, cap_bits, count. Grid: blocks."""
    rows = _padded(count, tuple(_MIN_NORM_WARPS))
    return Launch(f"min_norm {rows}", min_norm_kernel, {"ROWS": rows}, _MIN_NORM_WARPS[rows])


def combine(dtype: torch.dtype, out: torch.dtype, aligned: bool) -> Launch:
    """Arguments: addresses, weights, tiles, runs, count. Grid: all runs."""
    # 16 bytes a thread, of the narrower of the two dtypes.
    columns = _COMBINE_WARPS * 32 * (16 // min(dtype.itemsize, out.itemsize) if aligned else 2)
    constants = {"ELEMENT": ELEMENTS[dtype], "OUT": ELEMENTS[out], "COLUMNS": columns, "ALIGNED": aligned}
    name = f"combine {_name(dtype)} to {_name(out)}{_ragged(aligned)}"
    return Launch(name, combine_kernel, constants, _COMBINE_WARPS)


def every_launch() -> Iterator[Launch]:
    """Yields each launch there is."""
    for dtype, rows, aligned in itertools.product(ELEMENTS, ROWS, (True, False)):
        yield gram(dtype, rows, aligned)
    for dtype, rows, alike in itertools.product(INCOMING, ROWS, ((True, True), (True, False), (False, False))):
        yield accumulate(dtype, rows, *alike)
    for dtype, out, aligned in itertools.product(ELEMENTS, ELEMENTS, (True, False)):
        yield combine(dtype, out, aligned)
    yield from (add_partials(rows) for rows in ROWS)
    yield from (min_norm(rows) for rows in _MIN_NORM_WARPS)


def _gram_shape(dtype: torch.dtype, rows: int, aligned: bool) -> Shape:
    if rows > 8:
        shape = _DOT[dtype][rows]
        # Element by element, a load takes more registers for its addresses.
        return shape if aligned else Shape(shape.columns // 2, shape.warps, shape.stages)
    return Shape(_PAIRS.columns * (16 // dtype.itemsize if aligned else 1), _PAIRS.warps, _PAIRS.stages)


def _gram_constants(rows: int, shape: Shape, aligned: bool) -> dict[str, Any]:
    return {"ROWS": rows, "COLUMNS": shape.columns, "ALIGNED": aligned, "INTERPRETED": INTERPRETED}


def _padded(count: int, sizes: tuple[int, ...]) -> int:
    return next(size for size in sizes if count <= size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ragged(aligned: bool) -> str:
    return "" if aligned else " ragged"
