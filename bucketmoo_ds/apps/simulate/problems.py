"""The problems: two losses of some numbers, where runs start, and the Pareto front, which is computed.

A front is the curve of the minima of `t f_1 + (1 - t) f_2` for t between 0 and 1: closed forms for quadratics, a root
in one variable for the toy with the conflict.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of
from bucketmoo_ds.plan.blocks import Parameter
from bucketmoo_ds.plan.refined import NAME as REFINED

OBJECTIVES = ("first", "second")
GRANULARITIES = ("parameter", "model", REFINED)
RULES = ("mean", "mgda", "cagrad", "upgrad")
# Dense towards both ends, where a front may be flat or steep.
SHARES = torch.sigmoid(torch.linspace(-18.0, 18.0, 2001, dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class Problem:
    """N runs of two objectives on d numbers.

    Args:
        name, summary: what it is.
        starts: `[N, d]` float64.
        sizes: how the numbers are cut into parameters, which are called `x.0`, `x.1`, ...
        losses: from `[N, d]` to `[N, 2]`, row by row.
        front: `[N, P, 2]`, the losses of points on the Pareto front of each row, one after the other.
        steps, rate: of a run, where nothing else is asked for.
        adam: whether steps are Adam's; else they are plain gradient steps.
        used_by: as in `granularity_options`; empty where both objectives use all parameters.
    """

    name: str
    summary: str
    starts: Tensor
    sizes: tuple[int, ...]
    losses: Callable[[Tensor], Tensor]
    front: Tensor
    steps: int
    rate: float
    adam: bool = False
    used_by: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters, for a plan."""
        return [Parameter(f"x.{number}", size) for number, size in enumerate(self.sizes)]

    @property
    def bucket_size(self) -> int:
        """Elements of a bucket: the numbers lie in two."""
        return -(-sum(self.sizes) // 2)

    def outline(self, points: int) -> Tensor:
        """Returns so many points of each front, evenly along it, `[N, points, 2]`."""
        lengths = (self.front[:, 1:] - self.front[:, :-1]).norm(dim=-1).cumsum(1)
        wanted = lengths[:, -1:] * torch.linspace(0.0, 1.0, points, dtype=torch.float64)
        places = torch.searchsorted(lengths, wanted).unsqueeze(-1).expand(-1, -1, 2)
        return self.front.gather(1, places)

    def distance(self, losses: Tensor) -> Tensor:
        """Returns how far points `[N, 2]` of the space of losses are from the front, `[N]`."""
        start, end = self.front[:, :-1], self.front[:, 1:]
        along = end - start
        squares = along.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
        place = ((losses.unsqueeze(1) - start) * along).sum(-1) / squares
        nearest = start + place.clamp(0.0, 1.0).unsqueeze(-1) * along
        return (losses.unsqueeze(1) - nearest).norm(dim=-1).amin(1)


def conflict(seed: int) -> Problem:
    """The toy of CAGrad's paper (Liu et al., NeurIPS 2021, appendix): a valley whose walls are steep and in the way of
    each other, before a bowl that both objectives want a different side of."""

    def losses(x: Tensor) -> Tensor:
        across, along = x.unbind(-1)
        upper, lower = torch.tanh(0.5 * along).clamp(min=0.0), torch.tanh(-0.5 * along).clamp(min=0.0)
        walls = (0.5 * (-across - 7.0) - torch.tanh(-along), 0.5 * (-across + 3.0) - torch.tanh(-along) + 2.0)
        each = [
            upper * (torch.log(wall.abs().clamp(min=5e-6)) + 6.0) + lower * _bowl(across, along, side)
            for wall, side in zip(walls, (7.0, -7.0), strict=True)
        ]
        return torch.stack(each, -1)

    # In the bowl the gradient of t f_1 + (1 - t) f_2 is zero at across = 7 (2 t - 1), and along where `slope` is.
    across = 7.0 * (2.0 * SHARES - 1.0)

    def slope(along: Tensor) -> Tensor:
        height = SHARES * _bowl(across, along, 7.0) + (1.0 - SHARES) * _bowl(across, along, -7.0)
        return -0.5 / torch.cosh(0.5 * along).square() * height + torch.tanh(-0.5 * along) * 0.02 * (along + 8.0)

    low, high = torch.full_like(across, -12.0), torch.full_like(across, -8.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = slope(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    starts = torch.tensor([[-8.5, 7.5], [-8.5, 5.0], [9.0, 9.0]], dtype=torch.float64)
    front = losses(torch.stack([across, low], -1))
    return Problem(
        name="conflict",
        summary="CAGrad's toy, by Adam",
        starts=starts,
        sizes=(1, 1),
        losses=losses,
        front=front.expand(len(starts), -1, -1),
        steps=300,
        rate=0.1,
        adam=True,
    )


def _bowl(across: Tensor, along: Tensor, side: float) -> Tensor:
    return ((side - across).square() + 0.1 * (along + 8.0).square()) / 10.0 - 20.0


def quadratics(seed: int) -> Problem:
    """Four random pairs of quadratics in twelve dimensions; how far apart their minima are is random, too."""
    generator = torch.Generator().manual_seed(seed)
    count, dimensions = 4, 12
    apart = torch.logspace(-0.5, 0.5, count, dtype=torch.float64).view(-1, 1, 1)
    centres = apart * torch.randn(count, 2, dimensions, generator=generator, dtype=torch.float64)
    turns, _ = torch.linalg.qr(torch.randn(count, 2, dimensions, dimensions, generator=generator, dtype=torch.float64))
    curves = torch.logspace(0, 1, dimensions, dtype=torch.float64)
    return _of_quadratics(
        name="quadratics",
        summary="random ones in 12 dimensions, 4 parameters",
        matrices=(turns * curves) @ turns.mT,
        centres=centres,
        starts=2.0 * torch.randn(count, dimensions, generator=generator, dtype=torch.float64),
        sizes=(3,) * 4,
        steps=150,
        rate=0.1,
    )


def counterexample(seed: int) -> Problem:
    """Gradients (1, 1) and (-1, -2) at the first start: each number alone is stationary there, the pair is not."""
    centres = torch.tensor([[-1.0, -1.0], [1.0, 2.0]], dtype=torch.float64)
    starts = torch.tensor([[0.0, 0.0], [-2.5, 2.5], [3.0, 3.0]], dtype=torch.float64)
    return _of_quadratics(
        name="counterexample",
        summary="two numbers that both objectives use",
        matrices=torch.eye(2, dtype=torch.float64).expand(len(starts), 2, 2, 2),
        centres=centres.expand(len(starts), 2, 2),
        starts=starts,
        sizes=(1, 1),
        steps=120,
        rate=0.15,
    )


def structured(seed: int) -> Problem:
    """`f_1 = |s - u|^2 / 2 + |a - s|^2 / 2` and `f_2 = |s + u|^2 / 2 + |b + s|^2 / 2`: s is shared, a and b are not. At
    the first start the first objective is at its optimum."""
    generator = torch.Generator().manual_seed(seed)
    one, none = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    first = torch.cat([torch.cat(row, 1) for row in ([2 * one, -one, none], [-one, one, none], [none] * 3)])
    second = torch.cat([torch.cat(row, 1) for row in ([2 * one, none, one], [none] * 3, [one, none, one])])
    u = torch.tensor([1.0, 0.5], dtype=torch.float64)
    centres = torch.stack([torch.cat([u, u, 0 * u]), torch.cat([-u, 0 * u, u])])
    drawn = 2.0 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    starts = torch.cat([torch.cat([u, u, u + 2.0]).unsqueeze(0), drawn])
    return _of_quadratics(
        name="structured",
        summary="one parameter shared, one for each objective",
        matrices=torch.stack([first, second]).expand(len(starts), 2, 6, 6),
        centres=centres.expand(len(starts), 2, 6),
        starts=starts,
        sizes=(2, 2, 2),
        steps=120,
        rate=0.2,
        used_by={"x.1": [OBJECTIVES[0]], "x.2": [OBJECTIVES[1]]},
    )


def _of_quadratics(matrices: Tensor, centres: Tensor, starts: Tensor, **more: object) -> Problem:
    """Objective i is `(x - c_i)' A_i (x - c_i) / 2`, with A `[N, 2, d, d]` and c `[N, 2, d]`."""

    def losses(x: Tensor) -> Tensor:
        off = x.unsqueeze(-2) - centres
        return 0.5 * (off * (matrices @ off.unsqueeze(-1)).squeeze(-1)).sum(-1)

    shares = torch.stack([SHARES, 1.0 - SHARES], -1)  # [P, 2]
    pulls = (matrices @ centres.unsqueeze(-1)).squeeze(-1)
    optima = torch.linalg.solve(
        torch.einsum("pi,nijk->npjk", shares, matrices), torch.einsum("pi,nij->npj", shares, pulls)
    )
    front = torch.stack([losses(point) for point in optima.unbind(1)], 1)
    return Problem(starts=starts, losses=losses, front=front, **more)  # type: ignore[arg-type]


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    function.__name__: function for function in (conflict, quadratics, counterexample, structured)
}


def problem_of(name: str, seed: int) -> Problem:
    """Returns the problem of a name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in PROBLEMS:
        raise ConfigError(f'problem "{name}": unknown, expected {one_of(PROBLEMS)}{did_you_mean(name, PROBLEMS)}')
    return PROBLEMS[name](seed)


def spans(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns where each parameter begins and ends."""
    return list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
