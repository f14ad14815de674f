"""UPGrad: project every row onto the directions that harm nobody, then average."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._interior_point import minimize_quadratic
from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register

# Makes the smallest projection weights the solution where any number of them is as good (a Pareto-stationary block);
# an inner product of the result with a row may fall below 0 by this much, relative to the two norms.
RIDGE = 1e-12
# Entries of the matrices that are worked on at once: 4 MB each stay in cache, and many languages fit into memory.
AT_ONCE = 1 << 19


@register("upgrad")
@dataclasses.dataclass(frozen=True)
class UPGrad(Aggregator):
    """Unconflicting projection of gradients (Quinton & Rey, Jacobian Descent for Multi-Objective Optimization, 2024).

    Row i is replaced by its projection onto the cone `{d : <g_j, d> >= 0 for all j}`, whose weights are
    `argmin {v @ gram @ v : v >= e_i}` (proposition 1 there); the block's weights are the mean of these over i. The
    combined row harms no language to first order. They are TorchJD's weights with its default preference vector, but
    for its regularisation (`reg_eps`), which is 1e-4 of the trace there.
    """

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        cosines, norms, nonzero = unit_rows(gram, mask)
        # The cone knows directions only: the unit rows are projected, one problem a pair (block, language), and the
        # projections scaled back. A row that conflicts with no other is its own projection.
        block, language = (cosines < 0.0).any(-1).nonzero(as_tuple=True)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        projections = identity.repeat(len(gram), 1, 1)
        problems = max(1, AT_ONCE // identity.numel())
        for of_block, of_language in zip(block.split(problems), language.split(problems), strict=True):
            projections[of_block, of_language] += minimize_quadratic(
                cosines[of_block] + RIDGE * identity, cosines[of_block, of_language], nonzero[of_block]
            )
        divisor = torch.where(nonzero, norms, 1.0)
        lengths = torch.where(nonzero, norms, mask.to(norms.dtype))
        summed = (projections * lengths.unsqueeze(-1)).sum(-2) / divisor
        return summed / mask.sum(-1, keepdim=True)
