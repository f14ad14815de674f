"""SDMGrad: the shortest vector in the hull of the rows, drawn towards their mean, by a few steps downhill."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._definite import times
from bucketmoo_ds.aggregate.base import State, Stateful, check_number, register
from bucketmoo_ds.aggregate.mean import uniform
from bucketmoo_ds.errors import ConfigError


@register("sdmgrad")
@dataclasses.dataclass(frozen=True)
class SDMGrad(Stateful):
    """Direction-oriented multi-objective learning (Xiao, Ban & Ji, NeurIPS 2023, algorithm 1).

    With g_w the point of the hull of the rows with the weights w, and g_0 their mean, w goes down on
    `||g_w + l g_0||^2 / 2` over the simplex, `w <- project(w - eta A (w + l/K))`, for `steps` steps, and
    the combined row is `(g_w + l g_0) / (1 + l)`. l = 0 is MGDA, had it the time; a large l is averaging.

    The paper takes A from two batches that know nothing of each other, so that w goes down along what is unbiased: that
    is `gram: cross`. With `gram: plain` A has noise on its diagonal, and noisy languages lose weight for it. A few
    steps make the answer smooth in A, which a solution is not.

    `eta = 1 / max_i sum_j |A_ij|`, at most one over A's largest eigenvalue, so that the square never grows, and the
    scale of a block does not matter. (The paper's is a constant, and its code divides A by its rows' mean norm.)

    The descent begins where the last window's has ended (in the first one at 1/K each), so that the noise of a window
    moves w by `steps` small steps and no further. What is kept of a block is w times the number of languages that took
    part; fewer of them share it in proportion.

    Guarantee by block: none. A step may harm a language by what the mean harms it. `steps` products of K^2. It does
    not stream, though it is cheap: what is kept has to be alike on all ranks.

    Args:
        regularization: l, how much the mean counts.
        steps: how many.
    """

    regularization: float = 0.3
    steps: int = 20

    def __post_init__(self) -> None:
        check_number("sdmgrad", "regularization", self.regularization, 0.0, math.inf)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ConfigError(f'aggregator "sdmgrad": steps = {self.steps!r}: expected a whole number from 1 to 1000')

    def start(self, languages: int) -> State:
        """See `Stateful.start`."""
        return {"descended": torch.ones(languages, dtype=torch.float64)}

    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """See `Stateful.step`."""
        there = gram.diagonal(dim1=-2, dim2=-1) > 0.0  # rounding may leave less of a zero row
        seen = torch.where(there.unsqueeze(-1) & there.unsqueeze(-2), gram, 0.0)
        bound = seen.abs().sum(-1).amax(-1)[:, None, None]
        scaled = seen / torch.where(bound > 0.0, bound, 1.0)
        towards = self.regularization * uniform(mask)
        kept = torch.where(mask, state["descended"], 0.0)
        total = kept.sum(-1, keepdim=True)
        w = torch.where(total > 0.0, kept / torch.where(total > 0.0, total, 1.0), uniform(mask))
        for _ in range(self.steps):
            w = onto_simplex(w - times(scaled, w + towards), mask)
        descended = w * mask.sum(-1, keepdim=True)
        return (w + towards) / (1.0 + self.regularization), {"descended": descended}


def onto_simplex(point: Tensor, mask: Tensor) -> Tensor:
    """Returns the nearest points `[B, K]` of the simplex of the languages that count (Held, Wolfe & Crowder,
    Mathematical Programming 6, 1974); 0 for the others."""
    descending = torch.where(mask, point, -torch.inf).sort(-1, descending=True).values
    there = descending > -torch.inf
    known = torch.where(there, descending, 0.0)
    number = torch.arange(1, point.shape[-1] + 1, device=point.device, dtype=point.dtype)
    excess = (known.cumsum(-1) - 1.0) / number
    held = (there & (known > excess)).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, (point - excess.gather(-1, held - 1)).clamp(min=0.0), 0.0)
