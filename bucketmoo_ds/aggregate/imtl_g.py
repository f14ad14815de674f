"""IMTL-G: the direction whose projections on all rows are equal."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._impartial import impartial
from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register

# Of weights that sum to 1: what cancels further than this leaves more rounding than direction.
CANCELLED = 1e-3


@register("imtl_g")
@dataclasses.dataclass(frozen=True)
class IMTLG(Aggregator):
    """Impartial multi-task learning, gradients (Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, section
    3.1; for any Gram, Quinton & Rey, Jacobian Descent for Multi-Objective Optimization, 2024, appendix B).

    `v = gram^-1 norms` and `w = v / sum(v)`: `<g_i, d> / ||g_i||` is the same for all languages. Of two rows each gets
    the other's share of the norms. Weights may be negative, and their sum is 1: where v has both signs, d can be long.

    With rows of unlike norms `sum(v)` may be negative, and the paper's d then makes *every* language worse; or nearly
    0, and d is enormous. Where `sum(v)` is below 1e-3 of `sum(abs(v))` the weights are 0 here, and the block stands
    still. It does so, too, where rows are dependent such that no direction is impartial but 0 (`impartial`): more
    languages than dimensions, Pareto stationary or not. A zero row has no direction and takes no part; its weight is 0.

    Guarantee by block: `<g_i, d> >= 0` for all languages, up to 2e-6 of the sizes of d's parts. A Cholesky factor,
    K^3/3."""

    streams_up_to: ClassVar[int] = 16

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        cosines, norms, nonzero = unit_rows(gram, mask)
        v = impartial(cosines, nonzero) / torch.where(nonzero, norms, 1.0)
        total = v.sum(-1, keepdim=True)
        stands = total <= CANCELLED * v.abs().sum(-1, keepdim=True)
        return torch.where(stands, 0.0, v / torch.where(stands, 1.0, total))
