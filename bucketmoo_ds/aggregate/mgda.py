"""MGDA: the shortest vector in the convex hull of the rows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._interior_point import minimize_quadratic
from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.aggregate.mean import uniform


@register("mgda")
@dataclasses.dataclass(frozen=True)
class MGDA(Aggregator):
    """Multiple-gradient descent algorithm (Désidéri, C. R. Acad. Sci. Paris, 2012; Sener & Koltun, NeurIPS 2018).

    The weights minimise `w @ gram @ w` over the simplex. The combined row d then satisfies `<g_i, d> >= ||d||^2` for
    every language, so that a small step along -d harms none. Where the hull contains 0, d is 0: the block is Pareto
    stationary, and stands still. A zero row is such a case; all weight goes to the zero rows.

    Two languages have a closed form; more are solved to `w @ gram @ w - min_i (gram @ w)_i <= 1e-10 * trace` or better.
    """

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        cosines, norms, nonzero = unit_rows(gram, mask)
        if gram.shape[-1] == 2:
            weights = _two(cosines, norms, mask)
        else:
            # In units of the shortest row: w_i = price_i v_i, so that rows of norms 1e-3 and 1e3 cost no digits.
            shortest = torch.where(nonzero, norms, torch.inf).amin(-1, keepdim=True)
            price = torch.where(nonzero, shortest / norms, 0.0)
            several = mask.sum(-1) > 1
            v = torch.zeros_like(price)
            v[several] = minimize_quadratic(
                cosines[several], torch.zeros_like(price[several]), nonzero[several], price[several]
            )
            weights = torch.where(several.unsqueeze(-1), v * price, uniform(mask))
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        zero = mask & ~nonzero
        return torch.where(zero.any(-1, keepdim=True), uniform(zero), weights)


def _two(cosines: Tensor, norms: Tensor, mask: Tensor) -> Tensor:
    """Returns the weights `[B, 2]` of two rows a and b: clip(<b, b - a> / ||a - b||^2, 0, 1) and the rest."""
    first, second = norms[:, 0], norms[:, 1]
    product = cosines[:, 0, 1] * first * second
    # Each difference in the form that does not cancel where the other row is far shorter.
    to_first, to_second = second**2 - product, first**2 - product
    distance = to_first + to_second
    share = torch.where(distance > 0.0, to_first / torch.where(distance > 0.0, distance, 1.0), 0.5)
    share = torch.where(to_first <= 0.0, 0.0, torch.where(to_second <= 0.0, 1.0, share))
    share = torch.where((to_first <= 0.0) & (to_second <= 0.0), 0.5, share)
    share = torch.where(mask.all(-1), share, mask[:, 0].to(share.dtype))
    return torch.stack([share, 1.0 - share], dim=-1) * mask
