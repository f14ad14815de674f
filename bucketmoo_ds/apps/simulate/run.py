"""Descends a problem by one rule on the blocks of one granularity: the package's plan and its rules, on exact gradients
or noisy ones, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.apps.simulate.problems import OBJECTIVES, Problem, spans
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.plan import refined
from bucketmoo_ds.plan.blocks import BlockPlan, granularity_of, plan_blocks

POINTS = 17  # of a path that are kept


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of a problem's N starts.

    Args:
        steps: after which the points of the paths were taken, `[P]`.
        path: `[P, N, 2]`, losses.
        distance: `[N]`, of the last losses from the Pareto front.
        blocks: `[N]`, the largest norm of the min-norm points of the blocks at the end.
        whole: `[N]`, the norm of the min-norm point of the whole gradients there: 0 is Pareto stationary.
    """

    steps: list[int]
    path: Tensor
    distance: Tensor
    blocks: Tensor
    whole: Tensor

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain JSON values of five digits."""
        found = {name: short(getattr(self, name)) for name in ("distance", "blocks", "whole")}
        return {"steps": self.steps, "path": short(self.path.transpose(0, 1)), **found}


def blocks_of(problem: Problem, granularity: str) -> BlockPlan | None:
    """Returns the plan of a granularity; `None` for `refined` where both objectives use everything, as `model` does.

    Raises:
        ConfigError: an unknown granularity.
    """
    if granularity == refined.NAME and not problem.used_by:
        return None
    options = {"used_by": problem.used_by, "base": "parameter"} if granularity == refined.NAME else {}
    config = BucketMOOConfig(languages=OBJECTIVES, granularity=granularity, granularity_options=options)
    return plan_blocks(problem.parameters, problem.bucket_size, granularity_of(config))


def descend(
    problem: Problem,
    rule: str,
    plan: BlockPlan,
    *,
    steps: int | None = None,
    rate: float | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Run:
    """Descends from all starts.

    Args:
        rule: a name that `aggregate.create` knows.
        plan: see `blocks_of`.
        steps, rate: the problem's own where left out.
        noise: standard deviation of what is added to every element of every gradient, where its objective uses it.
        seed: of the noise, and of rules that draw.

    Raises:
        ConfigError: an unknown rule.
    """
    steps = problem.steps if steps is None else steps
    drawn = torch.Generator().manual_seed(seed)
    x = problem.starts.clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    if problem.adam:
        optimizer = torch.optim.Adam([x], lr=rate or problem.rate)
    else:
        optimizer = torch.optim.SGD([x], lr=rate or problem.rate)
    kept = torch.logspace(0, torch.tensor(max(steps, 1)).log10(), POINTS - 1).round().int().tolist()
    path = {0: problem.losses(problem.starts)}
    for step in range(1, steps + 1):
        rows = gradients(problem, x)
        if noise:
            rows = rows + noise * torch.randn(rows.shape, generator=drawn, dtype=torch.float64) * (rows != 0)
        weights = weights_of(rows, rule, plan, problem, torch.Generator().manual_seed((seed << 32) + step))
        x.grad = torch.cat(
            [
                (weights[:, block].unsqueeze(-1) * rows[..., begin:end]).sum(1)
                for block, (begin, end) in zip(plan.block_of, spans(problem.sizes), strict=True)
            ],
            dim=-1,
        )
        optimizer.step()
        if step in kept:
            path[step] = problem.losses(x.detach())
    rows, last = gradients(problem, x), problem.losses(x.detach())
    of_blocks, whole = grams(rows, plan, problem), (rows @ rows.mT).unsqueeze(1)
    return Run(
        steps=list(path),
        path=torch.stack(list(path.values())),
        distance=problem.distance(last),
        blocks=_least_norms(of_blocks, plan.counting(len(OBJECTIVES))).amax(1),
        whole=_least_norms(whole, None)[:, 0],
    )


def gradients(problem: Problem, x: Tensor) -> Tensor:
    """Returns the gradients of both objectives at points `[N, d]`, `[N, 2, d]`."""
    point = x.detach().requires_grad_()
    losses = problem.losses(point).sum(0)
    each = [torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses]
    return torch.stack(each, 1)


def grams(rows: Tensor, plan: BlockPlan, problem: Problem) -> Tensor:
    """Returns the Grams of the blocks of every start, `[N, B, 2, 2]`."""
    found = rows.new_zeros(len(rows), len(plan.blocks), len(OBJECTIVES), len(OBJECTIVES))
    for block, (begin, end) in zip(plan.block_of, spans(problem.sizes), strict=True):
        part = rows[..., begin:end]
        found[:, block] += part @ part.mT
    return found


def weights_of(rows: Tensor, rule: str, plan: BlockPlan, problem: Problem, generator: torch.Generator) -> Tensor:
    """Returns the rule's weights `[N, B, 2]` for gradients `[N, 2, d]`."""
    found = grams(rows, plan, problem)
    numbers = list(range(len(plan.blocks))) * len(rows)
    made = aggregate.create(rule).at(OBJECTIVES, range(len(OBJECTIVES)), numbers)
    mask = _mask(found, plan.counting(len(OBJECTIVES)))
    return aggregate.solve(found.flatten(0, 1), mask, made, generator=generator).view(found.shape[:-1])


def _least_norms(found: Tensor, counting: Tensor | None) -> Tensor:
    """The norms of the min-norm points of Grams `[N, B, 2, 2]`, `[N, B]`."""
    weights, _ = ops.min_norm(found.flatten(0, 1), _mask(found, counting), backend="reference")
    weights = weights.view(found.shape[:-1])
    return (weights * (found * weights.unsqueeze(-2)).sum(-1)).sum(-1).clamp(min=0.0).sqrt()


def _mask(found: Tensor, counting: Tensor | None) -> Tensor:
    if counting is None:
        counting = torch.ones(found.shape[1:3], dtype=torch.bool)
    return counting.repeat(len(found), 1)


def short(values: Tensor) -> Any:
    """Returns the elements as nested lists of numbers with five digits."""
    if values.dim():
        return [short(each) for each in values]
    return float(f"{float(values):.5g}")
