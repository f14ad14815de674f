"""The ops of the pipeline: tensors only, one signature, several backends. Segments of a shard carry *cells*, the parts
of blocks in one bucket; the Gram of a block is the sum of those of its cells.

    gram             rows of a shard           -> partial Grams [C, K, K]
    accumulate_gram  the same, while the last micro-step's gradients are added to the rows
    min_norm         Grams                     -> min-norm weights [B, K]
    combine          rows and weights          -> the combined shard [S]
    resolve          gram, min_norm and combine where the shard is whole

Rows are a list and are never stacked: the K rows of a shard lie where the exchange or the store put them. Schemas and
fakes stand in `bucketmoo_ds.ops.schemas`, implementations in `bucketmoo_ds.ops.backends`, the choice among them in
`bucketmoo_ds.ops.backends.choice`. Autograd is not supported: these are gradients already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds.ops import schemas  # noqa: F401  registers the ops
from bucketmoo_ds.ops.backends.choice import BACKENDS, ENVIRONMENT, choose_backend, using, why_unavailable

__all__ = [
    "BACKENDS", "ENVIRONMENT", "accumulate_gram", "choose_backend", "combine", "gram", "min_norm", "resolve",
    "using", "why_unavailable",
]  # fmt: skip

_ops = torch.ops.bucketmoo_ds


def gram(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int, *, backend: str = "auto") -> Tensor:
    """Returns the partial Grams of a shard's segments, added up by cell.

    Args:
        rows: K tensors `[S]` of one dtype (float32, bfloat16, float16 or float64), contiguous, at any alignment;
            beyond 64 they are taken in groups (`bucketmoo_ds.ops.groups`), at about twice the work.
        spans: `[n, 2]` int64 on the CPU: start and length of each segment, in elements, ascending, none overlapping.
        cells: `[n]` int64 on the CPU: the cell of each segment.
        num_cells: C.
        backend: see `choose_backend`.

    Returns:
        `[C, K, K]` float64 on the rows' device, symmetric to the bit, and equal to the bit from run to run. In every
        fast backend a permutation of the rows permutes it to the bit. What is not finite in a row stays in that row
        and column.

    Raises:
        ValueError: shapes, dtypes, devices or segments that do not fit.
        ConfigError: the backend cannot run on these tensors.
    """
    return _ops.gram(list(rows), spans, cells, num_cells, backend=backend)


def accumulate_gram(
    rows: Sequence[Tensor],
    incoming: Tensor,
    targets: Sequence[int],
    scales: Sequence[float],
    fresh: Sequence[bool],
    spans: Tensor,
    cells: Tensor,
    num_cells: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Adds `scales[p] * incoming[p]` to `rows[targets[p]]` for every p, in order, and returns `gram` of the result.

    One pass: the Gram is taken of the rows while they lie in registers or cache, so that it costs no further read.

    Args:
        rows: K float32 tensors `[S]`; they are written, elements outside of any segment too.
        incoming: P gradients `[P, S]` in one of the dtypes of rows, each contiguous; float64 ones are rounded to
            float32 first.
        targets: for each incoming gradient the index of its row, or -1 where it is left out.
        scales: for each incoming gradient what it is multiplied by.
        fresh: for each row whether its content is void: its first incoming gradient then overwrites it. A fresh row
            must have one.
        spans, cells, num_cells, backend: as in `gram`.

    Returns:
        `[C, K, K]` float64: to the bit what `gram` gives for the rows as they are afterwards.

    Raises:
        ValueError: as in `gram`; an index out of range; a fresh row without an incoming gradient.
        ConfigError: as in `gram`.
    """
    return _ops.accumulate_gram(
        list(rows), incoming, list(targets), list(scales), list(fresh), spans, cells, num_cells,
        backend=backend,
    )  # fmt: skip


def min_norm(gram: Tensor, mask: Tensor, *, max_weight: float = 1.0, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns the min-norm weights of every block: the minimum of `w @ gram @ w` over the capped simplex.

    Equal bits on every rank need equal Gram bytes and the same backend. A device's Gram is solved there, in one
    launch, without waiting for it; a backend of another device leaves a Gram that lies on the CPU to the CPU's own.

    Args:
        gram: `[B, K, K]` float64, symmetric, summed over all ranks.
        mask: `[B, K]` bool on the Gram's device, the languages that count in a block. The others get exactly 0, and
            their entries of the Gram, NaN included, influence nothing.
        max_weight: no weight is larger, in (0, 1]; in a block of n languages the larger of it and 1/n holds.
        backend: see `choose_backend`.

    Returns:
        weights: `[B, K]` float64, each block's sum 1 (0 where the mask is empty). Zero rows share all the weight that
            the cap lets them have, evenly.
        finite: `[B]` bool; a block whose unmasked Gram is not finite is false, and gets uniform weights.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a cap out of range.
        ConfigError: as in `gram`.
    """
    return _ops.min_norm(gram, mask, max_weight=max_weight, backend=backend)


def combine(
    rows: Sequence[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Writes the weighted sum of the rows of every segment into `out`; elements outside of any segment become 0.

    A weight of exactly 0 leaves its row out, so that a row that is not finite does no harm.

    Args:
        rows: K tensors `[S]`, as in `gram`.
        weights: `[C, K]` float64, on the rows' device (where they are read without waiting for it) or on the CPU.
        spans, cells: as in `gram`.
        out: `[S]`, any of the dtypes of rows; it may be one of the rows, and must overlap none otherwise.
        backend: see `choose_backend`.

    Returns:
        `out`.

    Raises:
        ValueError: as in `gram`.
        ConfigError: as in `gram`.
    """
    _ops.combine(list(rows), weights, spans, cells, out, backend=backend)
    return out


def resolve(
    rows: Sequence[Tensor],
    mask: Tensor,
    spans: Tensor,
    cells: Tensor,
    out: Tensor,
    *,
    max_weight: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`gram`, `min_norm` and `combine` in one call, where the shard is whole: one rank, or nothing to add from others.

    Args:
        rows: K tensors `[S]`, as in `gram`.
        mask: `[C, K]` bool on the rows' device.
        spans, cells: as in `gram`.
        out: `[S]`, as in `combine`.
        max_weight: as in `min_norm`.
        backend: see `choose_backend`.

    Returns:
        gram `[C, K, K]`, weights `[C, K]` and finite `[C]`, as in `gram` and `min_norm`.

    Raises:
        ValueError: as in `gram` and `min_norm`.
        ConfigError: as in `gram`.
    """
    return _ops.resolve(
        list(rows), mask, spans, cells, out, max_weight=max_weight, backend=backend
    )
