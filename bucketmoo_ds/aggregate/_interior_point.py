"""Batched primal-dual interior-point steps, and the quadratic program behind UPGrad.

It asks, for every block, for `v >= 0` and slacks `s >= 0` such that

    quadratic @ v + linear = s,    v_i s_i = 0 for every i,

which says that v minimises `v @ quadratic @ v / 2 + linear @ v` over the cone `v >= 0`. Newton steps follow the central
path `v_i s_i = mu` while mu goes to 0 (Mehrotra's predictor and corrector; Nocedal & Wright, Numerical Optimization,
2nd ed., algorithm 16.4).

Why not an active-set method: some 10 steps do whatever K is, rank-deficient Grams need no care of their own, and among
equally good solutions it finds the middle one, so that languages with equal gradients get equal weights in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps are far fewer, about 12; the cap is for what never converges.
MAX_STEPS = 50
# Relative residual and duality gap at which a problem is solved; rounding alone leaves about K * 1e-16.
TOLERANCE = 1e-14
# Below this, a step that does not improve the iterate shows that the digits of float64 are used up; above it only a
# step that breaks down does.
NEARLY = 1e-7
# In Newton's matrix only, relative to its diagonal: keeps Cholesky alive on singular Grams and moves no solution.
PROXIMAL = 1e-13
# The share of the way to the boundary v_i = 0 or s_i = 0 that a step goes.
BOUNDARY = 0.995


def minimize_quadratic(quadratic: Tensor, linear: Tensor, free: Tensor) -> Tensor:
    """Returns the v of the module's docstring for every problem of the batch.

    Args:
        quadratic: `[N, K, K]` float64, positive semidefinite, its diagonal about 1 where `free`, 0 outside.
        linear: `[N, K]` float64, 0 where not `free`.
        free: `[N, K]` bool; the other variables influence nothing.

    Returns:
        `[N, K]` float64, not negative; exactly 0 where `v_i >= 0` clearly binds or `free` is false.
    """
    on = free.to(quadratic.dtype)
    degree = on.sum(-1, keepdim=True).clamp(min=1.0)
    # A variable that is not free stays where it starts, at v = 1 and s = 0.
    v, s = run(_step, _error, [quadratic, linear, on, degree], [torch.where(free, 1.0 / degree, 1.0), on])
    binding = (v < s) & (v < TOLERANCE * v.amax(-1, keepdim=True))
    return torch.where(binding, 0.0, v) * on


def run(
    step: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    error: Callable[[list[Tensor], list[Tensor]], Tensor],
    constants: list[Tensor],
    state: list[Tensor],
    tolerance: float = TOLERANCE,
) -> list[Tensor]:
    """Steps N problems in lockstep and returns the final state of each.

    Args:
        step: from (constants, state) to the next state.
        error: from (constants, state) to `[N, 1]`, the distance from the solution, relative to the problem's size.
        constants: what a problem is; tensors with N as their first dimension.
        state: where it stands; likewise, of two dimensions.
        tolerance: the error at which a problem is solved.
    """
    result = state
    index = torch.arange(len(state[0]), device=state[0].device)
    errors = error(constants, state)
    going = errors > tolerance
    for _ in range(MAX_STEPS):
        count = int(going.sum())
        if count == 0:
            break
        if 2 * count <= len(going):  # Dropping what is solved costs some copies, so it waits until it pays.
            result = [old.index_copy(0, index, new) for old, new in zip(result, state, strict=True)]
            kept = going.squeeze(-1).nonzero().squeeze(-1)
            index, errors, going = index[kept], errors[kept], going[kept]
            constants, state = [tensor[kept] for tensor in constants], [tensor[kept] for tensor in state]
        after = step(constants, state)
        reached = error(constants, after)
        going = going & ((reached < errors) | ((errors > NEARLY) & reached.isfinite()))
        state = [torch.where(going, new, old) for old, new in zip(state, after, strict=True)]
        errors = torch.where(going, reached, errors)
        going = going & (errors > tolerance)
    return [old.index_copy(0, index, new) for old, new in zip(result, state, strict=True)]


def _error(constants: list[Tensor], state: list[Tensor]) -> Tensor:
    """Returns the larger of the relative duality gap and the relative residual, `[N, 1]`."""
    quadratic, linear, on, _ = constants
    v, s = state
    product = times(quadratic, v)
    size = dot(v, on)
    # The last term is what rounding leaves of a vanishing optimum, the square of a sum of unit rows.
    gap = dot(v, s) / (dot(v, product + linear).abs() + 1e-3 * size**2)
    return torch.maximum(gap, largest(product + linear - s) / (size + 1.0))


def _step(constants: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """Returns the state after one predictor-corrector step."""
    quadratic, linear, on, degree = constants
    v, s = state
    ratio = s / v
    newton = Newton(quadratic, ratio, times(quadratic, v) + linear - s, None)
    none = torch.zeros_like(degree)
    gap = dot(v, s)

    dv, _ = newton.direction(-s, none)
    ds = -s - ratio * dv
    length = longest_step(v, dv, s, ds).clamp(max=1.0)
    target = (dot(v + length * dv, s + length * ds) / gap).clamp(0.0, 1.0) ** 3 * gap / degree
    push = target * on / v - s - dv * ds / v
    dv, _ = newton.direction(push, none)
    ds = push - ratio * dv
    length = (BOUNDARY * longest_step(v, dv, s, ds)).clamp(max=1.0)
    return [v + length * dv, s + length * ds]


class Newton:
    """A factorised Newton system: `(hessian + diag(ratio)) dv - d_level price = push - slack`, `price @ dv = missing`.

    Args:
        hessian: `[N, K, K]`, positive semidefinite.
        ratio: `[N, K]`, not negative.
        slack: `[N, K]`.
        price: `[N, K]`; `None` where there is no level, and so no second equation.
    """

    def __init__(self, hessian: Tensor, ratio: Tensor, slack: Tensor, price: Tensor | None) -> None:
        matrix = hessian.clone()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.mul_(1.0 + PROXIMAL).add_(ratio)
        diagonal[diagonal == 0.0] = 1.0  # variables that are not free
        self.factor, self.slack, self.price = torch.linalg.cholesky_ex(matrix)[0], slack, price
        if price is not None:
            self.ahead = self._solve(price)
            self.slope = dot(price, self.ahead)

    def direction(self, push: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dv `[N, K]` and d_level `[N, 1]`."""
        dv = self._solve(push - self.slack)
        if self.price is None:
            return dv, missing
        d_level = (missing - dot(self.price, dv)) / self.slope
        return dv + d_level * self.ahead, d_level

    def _solve(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.unsqueeze(-1), self.factor).squeeze(-1)


def longest_step(v: Tensor, dv: Tensor, s: Tensor, ds: Tensor) -> Tensor:
    """Returns the step `[N, 1]`, at most 2, at which the first of v and s falls to zero."""
    # s is 0 where a variable is not free, and does not move there.
    fall = torch.maximum(-dv / v, -ds / s.clamp(min=torch.finfo(s.dtype).tiny))
    return 1.0 / fall.amax(-1, keepdim=True).clamp(min=0.5)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the product of each `[K, K]` with its `[K]`, summed in one fixed way whatever the batch."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Returns the inner products `[N, 1]` of two batches of vectors."""
    return (left * right).sum(-1, keepdim=True)


def largest(vector: Tensor) -> Tensor:
    """Returns the largest magnitude `[N, 1]` in each vector."""
    return vector.abs().amax(-1, keepdim=True)
