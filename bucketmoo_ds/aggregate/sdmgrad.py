"""SDMGrad: the shortest vector in the hull of the rows, drawn towards their mean, by a few steps downhill."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._definite import times
from bucketmoo_ds.aggregate.base import Aggregator, check_number, register
from bucketmoo_ds.aggregate.mean import uniform
from bucketmoo_ds.errors import ConfigError


@register("sdmgrad")
@dataclasses.dataclass(frozen=True)
class SDMGrad(Aggregator):
    """Direction-oriented multi-objective learning (Xiao, Ban & Ji, NeurIPS 2023, algorithm 1).

    With g_w the point of the hull of the rows with the weights w, and g_0 their mean, w goes down on
    `||g_w + l g_0||^2 / 2` over the simplex, `w <- project(w - eta A (w + l/K))`, for `steps` steps from 1/K each, and
    the combined row is `(g_w + l g_0) / (1 + l)`. l = 0 is MGDA, had it the time; a large l is averaging.

    The paper takes A from two batches that know nothing of each other, so that w goes down along what is unbiased: that
    is `gram: cross`. With `gram: plain` A has noise on its diagonal, and noisy languages lose weight for it. A few
    steps make the answer smooth in A, which a solution is not.

    `eta = 1 / max_i sum_j |A_ij|`, at most one over A's largest eigenvalue, so that the square never grows, and the
    scale of a block does not matter. (The paper's is a constant, and its code divides A by its rows' mean norm.)

    Guarantee by block: none. A step may harm a language by what the mean harms it. `steps` products of K^2.

    Args:
        regularization: l, how much the mean counts.
        steps: how many.
    """

    cheap: ClassVar[bool] = True

    regularization: float = 0.3
    steps: int = 20

    def __post_init__(self) -> None:
        check_number("sdmgrad", "regularization", self.regularization, 0.0, math.inf)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ConfigError(f'aggregator "sdmgrad": steps = {self.steps!r}: expected a whole number from 1 to 1000')

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        bound = gram.abs().sum(-1).amax(-1)[:, None, None]
        scaled = gram / torch.where(bound > 0.0, bound, 1.0)
        towards = self.regularization * uniform(mask)
        w = uniform(mask)
        for _ in range(self.steps):
            w = onto_simplex(w - times(scaled, w + towards), mask)
        return (w + towards) / (1.0 + self.regularization)


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
