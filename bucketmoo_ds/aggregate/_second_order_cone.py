"""The best direction of a ball, as a second-order cone program: the problem behind CAGrad.

For every block, over the simplex `price @ u = 1, u >= 0`:

    minimise  linear @ u + radius * sqrt(u @ gram @ u).

The norm becomes a variable, `(norm, u)` in the cone `norm >= sqrt(u @ gram @ u)`. Its dual is `(bound, y)` in the same
cone with `bound = radius` and `linear - gram @ y - level * price = s >= 0`; at the solution `-y` is u scaled to length
radius. Steps follow the central path in the scaling of Nesterov and Todd (Vandenberghe, The CVXOPT linear and quadratic
cone program solvers, 2010, sections 4 and 5), which treats both sides alike: a vanishing norm needs no care of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._interior_point import PROXIMAL, Newton, dot, largest, longest_step, run, times

# The errors at which interior points hand over to `_polish`, which needs to see what is 0 at the solution. Most
# problems show it at the first; further on norm^2 - u @ gram @ u loses its digits.
NEAR = (1e-6, 1e-9)
# The gap, relative to the largest gradient, at which a polished problem is solved.
SOLVED = 1e-10
# Centring and step length, from a grid over random Grams; longer steps jam at the surface of the curved cone.
LEAST_CENTRING = 0.1
BOUNDARY = 0.95
POLISHING_STEPS = 4


def minimize_linear_plus_norm(gram: Tensor, linear: Tensor, free: Tensor, price: Tensor, radius: float) -> Tensor:
    """Returns x = `radius * u / sqrt(u @ gram @ u)`, the minimiser u scaled to length radius, for every problem.

    Args:
        gram: `[N, K, K]` float64, positive semidefinite, its diagonal about 1 where `free`, 0 outside.
        linear: `[N, K]` float64, of magnitude about 1, 0 where not `free`.
        free: `[N, K]` bool; the other variables stay 0 and influence nothing.
        price: `[N, K]` float64, positive where `free` and 0 elsewhere.
        radius: positive.

    Returns:
        `[N, K]` float64, not negative, huge where the norm vanishes.
    """
    on = free.to(gram.dtype)
    # Every language starts with the same share of the simplex and the same product u_i s_i.
    u = torch.where(free, 1.0 / (price * on.sum(-1, keepdim=True)), 1.0)
    s = price / _cheapest([gram, linear, on, on, price])
    size = dot(u, on)
    ball = torch.full_like(size, radius)
    zero = torch.zeros_like(u)
    constants = [gram, linear, on, ball, price]
    state = [u, s, zero[:, :1], 2.0 * size, ball, zero]
    x = zero
    index = torch.arange(len(u), device=u.device)
    for tolerance in NEAR:
        state = run(_step, _error, constants, state, tolerance)
        u, s, level = state[0] * constants[2], state[1], state[2]
        near = u * (radius / dot(u, times(constants[0], u)).clamp(min=torch.finfo(u.dtype).tiny).sqrt())
        x = x.index_copy(0, index, _polish(constants, near, u > s, level))
        rest = (_gap(constants, x[index]) > SOLVED / _cheapest(constants)).squeeze(-1).nonzero().squeeze(-1)
        index, constants, state = index[rest], [c[rest] for c in constants], [c[rest] for c in state]
        if len(index) == 0:
            break
    return x


def _error(constants: list[Tensor], state: list[Tensor]) -> Tensor:
    """Returns the larger of the relative duality gap and the residuals, `[N, 1]`."""
    gram, linear, on, ball, price = constants
    u, s, level, norm, bound, y = state
    product = times(gram, y)
    gap = (dot(u, s + product) + norm * bound) / dot(u, on)
    slack = largest(linear - product - level * price - s)
    return torch.maximum(torch.maximum(gap.abs(), slack), (1.0 - dot(price, u)).abs() + (ball - bound).abs())


def _step(constants: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """Returns the state after one predictor-corrector step."""
    gram, linear, on, ball, price = constants
    u, s, level, norm, bound, y = state
    gu, gy = times(gram, u), times(gram, y)
    inside_u, inside_y = _inside(norm, dot(u, gu)), _inside(bound, dot(y, gy))
    root_u, root_y = inside_u.sqrt(), inside_y.sqrt()
    scale = root_u / root_y

    # The scaling point (w0, w): its quadratic representation, times `scale`, maps (bound, y) to (norm, u).
    gamma = (2.0 + 2.0 * (norm * bound + dot(y, gu)) / (root_u * root_y)).sqrt()
    w0, w = (norm / root_u + bound / root_y) / gamma, (u / root_u - y / root_y) / gamma
    gw = times(gram, w)
    side, corner = -2.0 * w0 * gw, 2.0 * w0 * w0 - 1.0
    top = torch.cat([gram + 2.0 * gw.unsqueeze(-1) * gw.unsqueeze(-2), side.unsqueeze(-1)], dim=-1)
    hessian = torch.cat([top, torch.cat([side, corner], dim=-1).unsqueeze(-2)], dim=-2) / scale.unsqueeze(-1)

    none = torch.zeros_like(norm)
    ratio = s / u
    slack = torch.cat([linear - gy - level * price - s, ball - bound], dim=-1)
    newton = Newton(hessian, torch.cat([ratio, none], dim=-1), slack, torch.cat([price, none], dim=-1))
    missing = 1.0 - dot(price, u)
    gap = dot(u, s + gy) + norm * bound

    def direction(push: Tensor, target: Tensor | float) -> list[Tensor]:
        push_bound = target * norm / inside_u - bound
        push_y = -target * u * on / inside_u - y
        d, d_level = newton.direction(torch.cat([push + times(gram, push_y), push_bound], dim=-1), missing)
        du, d_norm = d[:, :-1], d[:, -1:]
        along = 2.0 * (dot(gw, du) - w0 * d_norm)
        d_bound = push_bound + (w0 * along + d_norm) / scale
        return [du, push - ratio * du, d_level, d_norm, d_bound, push_y - (du + along * w) / scale]

    def length(d: list[Tensor]) -> Tensor:
        du, ds, _, d_norm, d_bound, dy = d
        both = torch.minimum(
            _longest_in_cone(d_norm**2 - dot(du, times(gram, du)), norm * d_norm - dot(du, gu), inside_u),
            _longest_in_cone(d_bound**2 - dot(dy, times(gram, dy)), bound * d_bound - dot(dy, gy), inside_y),
        )
        return torch.minimum(longest_step(u, du, s, ds), both)

    d = direction(-s, 0.0)
    left = 1.0 - length(d).clamp(max=1.0)  # Both residuals and the gap shrink by this factor along the predictor.
    target = left.clamp(min=LEAST_CENTRING) * gap / (on.sum(-1, keepdim=True) + 1.0)
    d = direction(target * on / u - s - d[0] * d[1] / u, target)
    step = (BOUNDARY * length(d)).clamp(max=1.0)
    return [now + step * change for now, change in zip(state, d, strict=True)]


def _inside(norm: Tensor, square: Tensor) -> Tensor:
    """Returns `norm^2 - square`, positive inside the cone, without the worst of its cancellation."""
    length = square.clamp(min=0.0).sqrt()
    return ((norm - length) * (norm + length)).clamp(min=torch.finfo(norm.dtype).tiny)


def _longest_in_cone(square: Tensor, slope: Tensor, inside: Tensor) -> Tensor:
    """Returns the least positive root of `square t^2 + 2 slope t + inside`, `[N, 1]`, infinite where there is none.

    With the coefficients of `(norm + t d_norm)^2 - |p + t d|^2` it is the step that reaches the cone's surface.
    """
    discriminant = slope * slope - square * inside
    below = discriminant.clamp(min=0.0).sqrt() - slope
    return torch.where((discriminant >= 0.0) & (below > 0.0), inside / below, torch.inf)


def _polish(constants: list[Tensor], x: Tensor, support: Tensor, level: Tensor) -> Tensor:
    """Returns x to the last digits: Newton's method on the equations that hold on its support, kept where it is better.

    With Z the support, they are `(gram @ x + linear - level * price)_Z = 0` and `x @ gram @ x = radius^2`.
    """
    gram, linear, _, ball, price = constants
    on = support.to(gram.dtype)
    restricted = gram * on.unsqueeze(-1) * on.unsqueeze(-2) + torch.diag_embed(torch.where(support, PROXIMAL, 1.0))
    price_on = price * on
    trial = x * on
    for _ in range(POLISHING_STEPS):
        product = times(gram, trial)
        lacks = torch.cat(
            [(level * price - linear - product) * on, 0.5 * (ball**2 - dot(trial, product))], dim=-1
        )
        top = torch.cat([restricted, -price_on.unsqueeze(-1)], dim=-1)
        bottom = torch.cat([product * on, torch.zeros_like(level)], dim=-1).unsqueeze(-2)
        change = torch.linalg.solve_ex(torch.cat([top, bottom], dim=-2), lacks)[0]
        trial, level = trial + change[:, :-1], level + change[:, -1:]
    trial = trial * on
    better = (trial >= 0.0).all(-1, keepdim=True) & (_gap(constants, trial) < _gap(constants, x))
    return torch.where(better, trial, x)


def _gap(constants: list[Tensor], x: Tensor) -> Tensor:
    """Returns the Frank-Wolfe gap `[N, 1]`: how much any point of the simplex could still gain, to first order."""
    gram, linear, on, ball, price = constants
    product = times(gram, x)
    gradient = linear + product * ball / dot(x, product).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    lowest = torch.where(on > 0.0, gradient / price, torch.inf).amin(-1, keepdim=True)
    return dot(gradient, x) / dot(price, x) - lowest


def _cheapest(constants: list[Tensor]) -> Tensor:
    """Returns the lowest price `[N, 1]`, that of the longest row: gradients are at most about 1 over it."""
    *_, price = constants
    return torch.where(price > 0.0, price, torch.inf).amin(-1, keepdim=True)
