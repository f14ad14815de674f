"""CAGrad: the direction near the mean row that does most for the language worst off."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.aggregate._scaling import positive_semidefinite, unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, check_number, register
from bucketmoo_ds.aggregate.mean import uniform
from bucketmoo_ds.errors import ConfigError

# A mean row shorter than this times the longest row is 0: the ball has no inside and d is 0 whatever the weights.
ZERO_MEAN = 1e-12
# A sum shorter than this times the sum of the norms of its parts is 0: its square has only rounding left.
CANCELLED = 1e-8
# Min-norm problems between the ends of the search; rows of norms 1e-3 to 1e3 need up to 20 for all digits, most 10.
TRIALS = 24
# What may be left of log(||g_w|| / t): rounding leaves about 1e-15.
FOUND = 1e-13


@register("cagrad")
@dataclasses.dataclass(frozen=True)
class CAGrad(Aggregator):
    """Conflict-averse gradient descent (Liu, Liu, Jin, Stone & Liu, NeurIPS 2021, algorithm 1).

    Maximises `min_i <g_i, d>` over `||d - g_0|| <= c ||g_0||`, with g_0 the mean row. By duality (equation 4 there)
    `d = g_0 + c ||g_0|| / ||g_w|| g_w`, where g_w is the point of the hull that minimises
    `<g_w, g_0> + c ||g_0|| ||g_w||`. As in TorchJD, d is not divided by 1 + c^2, and where g_w is 0 (the block is
    Pareto stationary: no d improves all) the weights are 0 and the block stands still.

    `clip_to_preference` is RACO's CAGrad-Clip (Chen, Li, Chen & Lin, Reward-free Alignment for Conflicting Objectives,
    ICML 2026): with p the weights of g_w in the hull and u those of the mean row, g_w becomes `sum min(p_i, u_i) g_i`,
    and is brought to the same length `c ||g_0||`. So the language that is worst off corrects the step by no more than
    its share. Where the clipped sum cancels, d is the mean row; a block that stands still without the clip still does.
    With a `preference`, u is its share, g_0 the weighted mean, and the hull that of the rows times the preference (the
    paper's is of the rows as they are: the same for equal ones). It gives up the best `min_i <g_i, d>` within the ball.

    Args:
        clip_to_preference: whether g_w's weights are clipped to those of the mean row.
        c: radius of the ball relative to the mean row, from 0 (plain averaging) to below 1.
        norm_eps: g_w counts as 0 when its norm is below this times the sum of the norms of its parts w_i g_i, and in
            any case where rounding is all that is left of it (1e-8 of them).
    """

    c: float = 0.5
    norm_eps: float = 1e-4
    clip_to_preference: bool = False

    def __post_init__(self) -> None:
        check_number("cagrad", "c", self.c, 0.0, 1.0)
        check_number("cagrad", "norm_eps", self.norm_eps, 0.0, 1.0)
        if not isinstance(self.clip_to_preference, bool):
            value = self.clip_to_preference
            raise ConfigError(f'aggregator "cagrad": clip_to_preference = {value!r}: expected true or false')

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        mean = uniform(mask)
        if self.c == 0.0:
            return mean
        cosines, norms, nonzero = unit_rows(gram, mask)
        cosines = positive_semidefinite(cosines, nonzero)
        gram = cosines * norms.unsqueeze(-1) * norms.unsqueeze(-2)
        to_mean = _times(gram, mean)
        mean_norm = _dot(mean, to_mean).clamp(min=0.0).sqrt()
        moves = mean_norm > ZERO_MEAN
        mean_norm = torch.where(moves, mean_norm, 1.0)
        vanishing = max(float(self.norm_eps), CANCELLED)
        shortest = torch.where(moves, torch.where(nonzero, norms, torch.inf).amin(-1, keepdim=True), 1.0)

        hull = _Hull(gram, nonzero, to_mean / (self.c * mean_norm), float(self.c))
        w = _search(hull, (vanishing * shortest).log())
        length = hull.square(w).sqrt()
        added = self.c * mean_norm / length * w
        if self.clip_to_preference:
            added = self._clipped(hull, torch.minimum(w, mean), norms) * mean_norm
        weights = mean + added
        # A zero row is the better g_w, unless some language does worse than standing still in the whole ball.
        improves = _dot(w, to_mean) + self.c * mean_norm * length > 0.0
        stationary = (length <= vanishing * _dot(w, norms)) | ((mask & ~nonzero).any(-1, keepdim=True) & improves)
        return torch.where(moves, torch.where(stationary, 0.0, weights), mean)

    def _clipped(self, hull: _Hull, w: Tensor, norms: Tensor) -> Tensor:
        """Returns the weights brought to the length c, 0 where their sum cancels."""
        length = hull.square(w).sqrt()
        return torch.where(length > CANCELLED * _dot(w, norms), self.c / length * w, 0.0)


@dataclasses.dataclass(frozen=True)
class _Hull:
    """The hull of the rows, and the mean row beside it.

    With r = `c ||g_0||`, `r ||g_w||` is the least of `r (||g_w||^2 / t + t) / 2` over lengths t > 0. So for a given t,
    with s = t / r, g_w minimises `||g_w + s g_0||`: it belongs to the shortest vector in the hull of the rows
    `g_i + s g_0`. The best t is `||g_w||` itself.
    """

    gram: Tensor  # [B, K, K], the longest row has norm 1
    on: Tensor  # [B, K] bool, the rows of the hull
    side: Tensor  # [B, K], <g_i, g_0> / r
    c: float

    def point(self, log_t: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights `[B, K]` of g_w for the lengths t `[B, 1]`, and `log(||g_w|| / t)` `[B, 1]`; nothing of
        meaning, and in no time, for blocks that are not `going` `[B, 1]`."""
        t = log_t.exp()
        side = t * self.side
        square = (t / self.c).square()
        gram = self.gram + (side.unsqueeze(-1) + side.unsqueeze(-2) + square.unsqueeze(-1))
        w = ops.min_norm(gram, self.on & going)[0]
        return w, 0.5 * self.square(w).log() - log_t

    def square(self, w: Tensor) -> Tensor:
        """Returns `||g_w||^2` `[B, 1]`, never 0."""
        return _dot(w, _times(self.gram, w)).clamp(min=torch.finfo(w.dtype).tiny)


def _search(hull: _Hull, least: Tensor) -> Tensor:
    """Returns the weights of the g_w whose norm is the t that it belongs to; where that t is below the least `[B, 1]`
    (a logarithm, too), of the g_w that belongs to the least.

    `||g_w||` does not fall as t grows, and `||g_w|| / t` does not grow. So over log t, `log(||g_w|| / t)` has a slope
    from -1 to 0: from where it is positive, its root is at least that much to the right, and likewise to the left.
    Within these bounds regula falsi finds it (the Illinois variant: Dowell & Jarratt, BIT 11, 1971).
    """
    most = torch.zeros_like(least)  # no point of the hull is longer than its longest row
    all_blocks = torch.ones_like(least, dtype=torch.bool)
    (at_least, above), (at_most, below) = hull.point(least, all_blocks), hull.point(most, all_blocks)
    w = torch.where((above > 0.0) & (-below < above), at_most, at_least)
    ends, values = torch.cat([least, most], dim=-1), torch.cat([above, below], dim=-1)
    # As regula falsi sees them: the value of an end that stays where it is for a second time is halved.
    seen, factor = values, torch.ones_like(values)
    going = above > 0.0
    for _ in range(TRIALS):
        nearest = values.abs().amin(-1, keepdim=True)
        going = going & (nearest > FOUND)
        low, high = (ends + values).unbind(-1)
        share = seen[:, :1] / (seen[:, :1] - seen[:, 1:])
        trial = torch.lerp(ends[:, :1], ends[:, 1:], share)
        trial = torch.minimum(torch.maximum(trial, low.unsqueeze(-1)), high.unsqueeze(-1))
        found, value = hull.point(trial, going)
        w = torch.where(going & (value.abs() < nearest), found, w)
        positive = value > 0.0
        moved = torch.cat([positive, ~positive], dim=-1)
        ends, values = torch.where(moved, trial, ends), torch.where(moved, value, values)
        seen = torch.where(moved, value, seen * factor)
        factor = 0.5 + 0.5 * moved
    return w


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the product of each `[K, K]` with its `[K]`, summed in one fixed way whatever the batch."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Returns the inner products `[B, 1]` of two batches of vectors."""
    return (left * right).sum(-1, keepdim=True)
