"""Eigenvalues and eigenvectors on the device of the matrices, without a question to it: torch's own read an error code
back from the device, and their bits depend on the library."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._definite import RIDGE, ridged_cholesky

# Sweeps for K = 2, and one more for each doubling of K: until products of rows are at rounding.
SWEEPS = 3


def spectrum(gram: Tensor, more_sweeps: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues and eigenvectors of Grams.

    The columns of a Cholesky factor are rotated in pairs, each pair such that its product becomes 0, K / 2 disjoint
    pairs in a round; after K - 1 rounds, a sweep, every two have met (Hestenes, J. SIAM 6, 1958; Brent & Luk, SIAM J.
    Scientific and Statistical Computing 6, 1985). Convergence is quadratic, soonest where long rows come first (Veselic
    & Hari, Numerische Mathematik 56, 1989), and the number of sweeps is fixed.

    Args:
        gram: `[B, K, K]` float64, the longest row about 1.
        more_sweeps: for matrices whose eigenvalues lie close together, beside what Grams take.

    Returns:
        values: `[B, K]`, in no order; with an odd K one more, below 0.
        vectors: `[B, K, K]`, the j-th, of norm 1, in row j; with an odd K one more row, which is 0.
    """
    order = gram.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True).unsqueeze(-1).expand_as(gram)
    factor = ridged_cholesky(gram.gather(1, order).gather(2, order.mT))[0]
    factor = torch.zeros_like(factor).scatter(1, order, factor)
    half = (factor.shape[-1] + 1) // 2
    # Columns first and blocks last, so that all entries of a product lie side by side. Pairs are i and i + half.
    columns = torch.nn.functional.pad(factor, (0, 2 * half - factor.shape[-1])).permute(2, 1, 0).contiguous()
    for _ in range((2 * half - 1) * (SWEEPS + more_sweeps + (half - 1).bit_length())):
        left, right = columns.chunk(2)
        product, difference = _summed(left * right), _summed(right.square() - left.square())
        scale = difference.abs() + (difference.square() + 4.0 * product.square()).sqrt()
        tangent = torch.where(difference < 0.0, -2.0, 2.0) * product / torch.where(scale > 0.0, scale, 1.0)
        cosine = 1.0 / (1.0 + tangent.square()).sqrt()
        sine = tangent * cosine
        left, right = cosine * left - sine * right, sine * left + cosine * right
        # The next round's pairs: the first stays where it is, and the others move round by one place.
        ring = [left[:1], right[:1], left[1:-1], right[1:], left[-1:]] if half > 1 else [left, right]
        columns = torch.cat(ring)
    rows = columns.permute(2, 0, 1).contiguous()
    squares = rows.square().sum(-1)
    return squares - RIDGE, rows / torch.where(squares > 0.0, squares, 1.0).sqrt().unsqueeze(-1)


def _summed(entries: Tensor) -> Tensor:
    """Returns the sums `[P, 1, B]` of `[P, K, B]`, halves upon halves: torch's own order depends on B."""
    while entries.shape[1] > 1:
        half = entries.shape[1] // 2
        folded = entries[:, :half] + entries[:, half : 2 * half]
        entries = torch.cat([folded, entries[:, 2 * half :]], 1) if entries.shape[1] % 2 else folded
    return entries
