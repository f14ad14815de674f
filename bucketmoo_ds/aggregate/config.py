"""ConFIG: the direction of equal cosines with all rows, as long as the rows agree with it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._impartial import impartial
from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register


@register("config")
@dataclasses.dataclass(frozen=True)
class ConFIG(Aggregator):
    """Conflict-free inverse gradients (Liu, Chu & Thuerey, ConFIG, ICLR 2025, equation 2).

    With unit rows u_i, d has the direction of `pinv(U) 1`, and the length `mean_i <g_i, d / ||d||>`: the paper sums the
    projections where here they are averaged. It is IMTL-G's direction. The vector t of least norm in the affine hull of
    the unit rows has it, and `d = mean(||g_i||) t`, so `w_i = mean(||g||) b_i / ||g_i||` with t's weights b: nothing is
    divided by the norm of a direction that cancels. Parallel rows of any norms get the mean row.

    Where rows are dependent such that no direction has equal cosines but 0, the block stands still; the pseudo-inverse
    would give the nearest in least squares, which may harm languages, and jumps between the two (`impartial`). Rows
    that are nearly so get weights of mixed signs, up to about 700 times `mean(||g||) / ||g_i||`. A zero row has no
    direction: its weight is 0, and the mean counts it. A row that is nearly zero counts as much as any other, and so
    does its noise.

    Guarantee by block: `<g_i, d> >= 0` for all languages, up to 2e-6 of the sizes of d's parts. A Cholesky factor,
    K^3/3."""

    streams_up_to: ClassVar[int] = 16

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        cosines, norms, nonzero = unit_rows(gram, mask)
        mean = norms.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        return mean * impartial(cosines, nonzero) / torch.where(nonzero, norms, 1.0)
