"""FairGrad: alpha-fair gains, from averaging over bargaining towards the language worst off."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._fair import fair
from bucketmoo_ds.aggregate.base import Aggregator, check_number, register


@register("fairgrad")
@dataclasses.dataclass(frozen=True)
class FairGrad(Aggregator):
    """Fair resource allocation in multi-task learning (Ban & Ji, ICML 2024, equation 4).

    `gram @ w = w^(-1/alpha)` with w > 0, which maximises `sum_i <g_i, d>^(1 - alpha) / (1 - alpha)` over directions d
    of one length. `alpha = 1` is Nash-MTL's direction, a small alpha averaging's, a large one lets the language of the
    least gain decide. The paper hands the equation to a least-squares solver; here it is a convex problem (`fair`).

    The equation fixes a length, too, one of no use: with the Gram c times as large, w is `c^(-alpha / (1 + alpha))`
    times as large. Here d is scaled as Nash-MTL's is: `sum_i w_i ||g_i|| = mean ||g_i||`. A zero row is left out, with
    weight 0; with alpha above 1 a short one gets more weight than `1 / ||g_i||`.

    Guarantee by block: `<g_i, d> > 0` for all languages. 32 Newton steps of K^3/3 each; 16 with alpha = 1.

    Args:
        alpha: from 0.5 to below 4.1; with others the equation has more digits between its sides than float64.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number("fairgrad", "alpha", self.alpha, 0.5, 4.1)

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        return fair(gram, mask, 1.0 / self.alpha)
