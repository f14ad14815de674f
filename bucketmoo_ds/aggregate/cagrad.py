"""CAGrad: the direction near the mean row that does most for the language worst off."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate._second_order_cone import minimize_linear_plus_norm
from bucketmoo_ds.aggregate.base import Aggregator, check_number, register
from bucketmoo_ds.aggregate.mean import uniform

# A mean row shorter than this times the longest row is 0: the ball has no inside and d is 0 whatever the weights.
ZERO_MEAN = 1e-12


@register("cagrad")
@dataclasses.dataclass(frozen=True)
class CAGrad(Aggregator):
    """Conflict-averse gradient descent (Liu, Liu, Jin, Stone & Liu, NeurIPS 2021, algorithm 1).

    Maximises `min_i <g_i, d>` over `||d - g_0|| <= c ||g_0||`, with g_0 the mean row. By duality (equation 4 there)
    `d = g_0 + c ||g_0|| / ||g_w|| g_w`, where g_w is the point of the hull that minimises
    `<g_w, g_0> + c ||g_0|| ||g_w||`. As in TorchJD, d is not divided by 1 + c^2, and where g_w is 0 (the block is
    Pareto stationary: no d improves all) the weights are 0 and the block stands still.

    Args:
        c: radius of the ball relative to the mean row, from 0 (plain averaging) to below 1.
        norm_eps: g_w counts as 0 when its norm is below this times the sum of the norms of its parts w_i g_i.
    """

    c: float = 0.5
    norm_eps: float = 1e-4

    def __post_init__(self) -> None:
        check_number("cagrad", "c", self.c, 0.0, 1.0)
        check_number("cagrad", "norm_eps", self.norm_eps, 0.0, 1.0)

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        mean = uniform(mask)
        if self.c == 0.0:
            return mean
        cosines, norms, nonzero = unit_rows(gram, mask)
        # In unit rows, and with g_0 scaled to norm 1, the optimality conditions are those of a point on a sphere:
        # with x = c g_w / ||g_w||, <g_i, g_0 + x> is equal for the languages in g_w and no smaller for the others.
        to_mean = (cosines * (mean * norms).unsqueeze(-2)).sum(-1)
        mean_norm = (mean * norms * to_mean).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
        moves = mean_norm.squeeze(-1) > ZERO_MEAN
        to_mean = to_mean / torch.where(moves.unsqueeze(-1), mean_norm, 1.0)
        shortest = torch.where(nonzero, norms, torch.inf).amin(-1, keepdim=True)
        price = torch.where(nonzero, shortest / norms, 0.0)
        x = torch.zeros_like(mean)
        x[moves] = minimize_linear_plus_norm(
            cosines[moves], to_mean[moves], nonzero[moves], price[moves], float(self.c)
        )
        weights = mean + mean_norm * torch.where(nonzero, x / norms, 0.0)
        # A zero row is the better g_w, unless some language does worse than standing still in the whole ball.
        improves = (to_mean * x).sum(-1) + self.c**2 > 0.0
        stationary = (self.c < self.norm_eps * x.sum(-1)) | ((mask & ~nonzero).any(-1) & improves)
        weights = torch.where(stationary.unsqueeze(-1), 0.0, weights)
        return torch.where(moves.unsqueeze(-1), weights, mean)
