"""Nash-MTL: the languages bargain for the direction."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._fair import fair
from bucketmoo_ds.aggregate.base import Aggregator, register


@register("nash_mtl")
@dataclasses.dataclass(frozen=True)
class NashMTL(Aggregator):
    """Multi-task learning as a bargaining game (Navon et al., ICML 2022, equation 2).

    `gram @ w = 1 / w` with w > 0, which maximises `prod_i <g_i, d>` over directions d of one length: doubling a row
    changes no direction. The paper solves it by a sequence of convex problems from the last window's weights; here it
    is one convex problem (`fair`), solved anew, so that there is no state.

    The paper's d has the norm sqrt(K), whatever the gradients are, and is then cut to 1. Here it is scaled such that
    `sum_i w_i ||g_i|| = mean ||g_i||`: parallel rows give the mean row, and d is 0 where a block is Pareto stationary.

    A zero row gains by no direction, and the product is 0: it is left out, with weight 0. A row that is nearly zero
    counts as much as any other, and so does its noise. Where rows nearly cancel, d is what is left of a difference.

    Guarantee by block: `<g_i, d> > 0` for all languages. 16 Newton steps of K^3/3 each.
    """

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        return fair(gram, mask, 1.0)
