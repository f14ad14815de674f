"""The min-norm weights of every block, to be read: the definition of `min_norm` that every faster backend ports.

The shortest vector of a hull, `min w @ gram @ w` over weights of sum 1 with `0 <= w <= cap`, is a small convex program.
It is solved exactly, by a primal active-set method (Wolfe, Finding the nearest point in a polytope, Mathematical
Programming 11, 1976, with upper bounds; Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 16.3):

* Variables are lengths `v_i = w_i / price_i`, with `price_i = d_min / d_i` and d the rows' norms, over the cosines of
  the rows: norms of 1e-3 and 1e3 in one block then cost no digits. The weights' sum becomes `price @ v = mass`.
* A row is at 0, at its cap, or free. With the others held, the free rows satisfy `(C v)_i = level * price_i` (C the
  cosines): one Cholesky factor. v is optimal where the free rows are inside their bounds, and no other row could
  shorten the combined row: `(C v)_i >= level * price_i` at 0, `<=` at the cap.
* It starts boldly: all rows are free, and those whose solution is out of bounds are held at the bound, on whichever
  side more weight is out (Bitran & Hax, Management Science 27, 1981: that keeps the rest feasible), until none is out.
  Then the rows that violate optimality about most become free, and so on.
* When that makes the combined row no shorter it is taken back, and from there on only the worst row becomes free, and v
  goes towards the solution of the free rows no further than the first bound, whose rows are held: the combined row
  only gets shorter, so that no set of free rows comes twice.

A ridge on the diagonal keeps Cholesky alive on dependent rows, and shares weight evenly among equal ones. The Gram of
dependent rows that was summed in float32 has eigenvalues of about -1e-7, and the ridge that makes it definite is so
much larger that the answer is that of another problem. From there v goes on with the ridge about itself instead of
about 0 (proximal steps: Rockafellar, SIAM J. Control and Optimization 14, 1976): `(C t)_i + ridge (t - v)_i = level *
price_i` makes the combined row shorter, whatever the ridge, and rests where the given Gram's own conditions of the
first order hold. The ridge is then the smallest that the free rows alone take. They change only in directions that
keep the weights' sum, which counts with a factor, `LIFT`, so that the ridge need not make the other direction definite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ZERO_ROW = 1e-15  # of the longest row: float64 cannot tell such a row's products from rounding
RIDGE = 1e-13  # about what rounding to float64 takes from an eigenvalue of the cosines
OPTIMAL = 1e-13  # of the sum of the lengths: what may be left of a violation; rounding leaves some 1e-15
ABOUT_AS_BAD = 0.5  # of the worst violation: such rows become free together, equal rows among them
TIED = 1e-6  # rows that reach their bounds this close together are held together
ROUNDING = 1e-15  # of a weight at a bound
LIFT = 16.0  # of the squared sum of the free rows' weights, relative to their prices: about as large as cosines are
REFINEMENTS = 2  # each takes three digits off the error that a ridge of 1e-13 lets rounding make among equal rows


def min_norm(gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """See `bucketmoo_ds.ops.min_norm`."""
    gram = torch.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), gram, 0.0)
    finite = gram.isfinite().flatten(1).all(-1)
    # As zero rows, rows that are not finite share their weight evenly.
    gram = torch.where(finite[:, None, None], gram, 0.0)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1).clamp(min=0.0)
    gram = gram / torch.where(largest > 0.0, largest, 1.0)[:, None, None]
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()

    cap = (1.0 / _count(mask).clamp(min=1.0)).clamp(min=max_weight)
    nonzero = norms > ZERO_ROW
    zero = mask & ~nonzero
    zeros = _count(zero)
    weights = zero * torch.minimum(1.0 / zeros.clamp(min=1.0), cap)
    mass = torch.where(zeros * cap >= 1.0, 0.0, 1.0 - zeros * cap)
    others = torch.where(mass > 0.0, _count(nonzero), 0.0).squeeze(-1)
    for chosen, method in ((others == 1, _one), (others == 2, _two), (others > 2, _active_set)):
        if bool(chosen.any()):
            weights[chosen] += method(gram[chosen], norms[chosen], nonzero[chosen], mass[chosen], cap[chosen])
    return weights, finite


def _one(gram: Tensor, norms: Tensor, on: Tensor, mass: Tensor, cap: Tensor) -> Tensor:
    return on * mass


def _two(gram: Tensor, norms: Tensor, on: Tensor, mass: Tensor, cap: Tensor) -> Tensor:
    """Closed form: of two rows a and b the first gets `<b, b - a> / |a - b|^2` of the mass, within its bounds."""
    places = on.nonzero()[:, 1].reshape(-1, 2)
    block = torch.arange(len(gram), device=gram.device)
    first, second = places.unbind(-1)
    product = gram[block, first, second]
    to_first, to_second = gram[block, second, second] - product, gram[block, first, first] - product
    distance = to_first + to_second
    share = torch.where(distance > 0.0, to_first / torch.where(distance > 0.0, distance, 1.0), 0.5).unsqueeze(-1)
    share = torch.minimum(torch.maximum(share * mass, mass - cap), cap).clamp(min=0.0).minimum(mass)
    return torch.zeros_like(norms).scatter(1, places, torch.cat([share, mass - share], dim=-1))


def _active_set(gram: Tensor, norms: Tensor, on: Tensor, mass: Tensor, cap: Tensor) -> Tensor:
    """Returns the weights `[N, K]` of the rows `on`, of sum `mass` `[N, 1]`, each at most `cap` `[N, 1]`."""
    problem = _Problem.of(gram, norms, on, mass, cap)
    state = _State(torch.zeros_like(norms), on, torch.zeros_like(on))
    before, shortest, ridge = state, torch.full_like(mass, torch.inf), problem.ridge
    bold = going = torch.ones_like(mass, dtype=torch.bool)
    about_v = torch.zeros_like(bold)
    for _ in range(24 * gram.shape[-1] + 96):
        target, level, ridge = _among_free(problem, state, ridge, about_v)
        # A single free row has no choice: what it is out of its bounds is rounding.
        several = state.free & (_count(state.free) > 1.0)
        below, above = several & (target < 0.0), several & (target > problem.upper)
        stopped = (below | above).any(-1, keepdim=True)

        blocking, length = _blocking(problem, state, target, below, above)
        held = torch.where(bold, _outside(problem, target, below, above), blocking)
        v = state.v + torch.where(bold, 1.0, length) * (target - state.v)
        v = torch.where(state.free, v.clamp(min=0.0).minimum(problem.upper), state.v)
        v = torch.where(held, torch.where(below, 0.0, problem.upper), v)
        moved = _State(v, state.free & ~held, state.at_cap | (held & above))

        gradient = _times(problem.cosines, v) + torch.where(about_v, 0.0, ridge) * v
        square = (gradient * v).sum(-1, keepdim=True)
        failed = ~stopped & bold & (square >= shortest)
        released, better = _released(problem, moved, gradient, level, torch.where(bold, ABOUT_AS_BAD, 1.0))
        # Of free rows, the ridge about v leaves as much of a violation as it moves them by.
        farthest = (v - state.v).abs().amax(-1, keepdim=True)
        unsettled = about_v & (ridge * farthest > OPTIMAL * v.sum(-1, keepdim=True))
        optimal = ~stopped & ~failed & ~unsettled & ~better
        begins = optimal & ~about_v & (ridge > RIDGE)

        accepted = going & ~stopped & ~failed & ~optimal
        next_state = _either(stopped | unsettled | begins, moved, _either(failed, before, released))
        state = _either(going, next_state, state)
        before, shortest = _either(accepted, state, before), torch.where(accepted, square, shortest)
        bold, about_v = bold & ~failed & ~begins, about_v | (going & begins)
        going = going & (~optimal | begins)
        if not bool(going.any()):
            break
    weights = problem.price * state.v
    weights = weights * (mass / weights.sum(-1, keepdim=True))
    return torch.minimum(weights, cap)


class _Problem(NamedTuple):
    cosines: Tensor  # [N, K, K], 0 where a row is not `on`
    ridge: Tensor  # [N, 1], which makes them definite
    price: Tensor  # [N, K]
    upper: Tensor  # [N, K], the largest v
    on: Tensor  # [N, K]
    mass: Tensor  # [N, 1]
    cap: Tensor  # [N, 1], the largest weight

    @classmethod
    def of(cls, gram: Tensor, norms: Tensor, on: Tensor, mass: Tensor, cap: Tensor) -> _Problem:
        divisor = torch.where(on, norms, 1.0)
        cosines = gram / (divisor.unsqueeze(-1) * divisor.unsqueeze(-2))
        cosines = torch.where(on.unsqueeze(-1) & on.unsqueeze(-2), cosines, 0.0)
        price = torch.where(on, torch.where(on, norms, torch.inf).amin(-1, keepdim=True) / divisor, 0.0)
        upper = torch.where(on & (cap < mass), cap / torch.where(on, price, 1.0), torch.inf)
        _, ridge = _cholesky(cosines, torch.full_like(mass, RIDGE), on, torch.ones_like(mass, dtype=torch.bool))
        return cls(cosines, ridge, price, upper, on, mass, cap)


class _State(NamedTuple):
    v: Tensor  # [N, K]
    free: Tensor  # [N, K] bool
    at_cap: Tensor  # [N, K] bool; rows `on` that are neither are at 0


def _either(condition: Tensor, one: _State, other: _State) -> _State:
    return _State(*(torch.where(condition, a, b) for a, b in zip(one, other, strict=True)))


def _among_free(
    problem: _Problem, state: _State, ridge: Tensor, about_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best lengths `[N, K]` of the free rows beside the others' v (0 for these), without regard to their
    bounds, their level `[N, 1]`, and the ridge; about v it is chosen anew, not far from where it was."""
    cosines, _, price, *_ = problem
    held = torch.where(state.free, 0.0, state.v)
    paid = price * state.free
    lift = torch.where(about_v, LIFT / paid.square().sum(-1, keepdim=True), 0.0)
    lifted = cosines + (lift * price).unsqueeze(-1) * price.unsqueeze(-2)
    ridge = torch.where(about_v, (ridge / 64.0).clamp(min=RIDGE), ridge)
    factor, ridge = _cholesky(lifted, ridge, state.free, about_v)
    pull = _times(cosines, held) - torch.where(about_v, ridge, 0.0) * state.v
    right = torch.stack([paid, pull * state.free], dim=-1)
    solution = torch.zeros_like(right)
    for _ in range(1 + REFINEMENTS):
        # Column by column, so that equal rows have equal residuals to the bit.
        product = torch.stack(
            [
                _times(cosines, column) + lift * paid * (paid * column).sum(-1, keepdim=True)
                for column in solution.unbind(-1)
            ],
            dim=-1,
        )
        residual = (right - product - ridge.unsqueeze(-1) * solution) * state.free.unsqueeze(-1)
        solution = solution + torch.cholesky_solve(residual, factor)
    ahead, back = (solution * state.free.unsqueeze(-1)).unbind(-1)
    rest = problem.mass - (price * held).sum(-1, keepdim=True)
    level = (rest + (price * back).sum(-1, keepdim=True)) / (price * ahead).sum(-1, keepdim=True)
    return level * ahead - back, level - lift * rest, ridge


def _outside(problem: _Problem, target: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Returns the rows out of bounds on the side where more weight is."""
    under = torch.where(below, -problem.price * target, 0.0).sum(-1, keepdim=True)
    over = torch.where(above, problem.price * (target - problem.upper), 0.0).sum(-1, keepdim=True)
    return torch.where(under >= over, below, above)


def _blocking(
    problem: _Problem, state: _State, target: Tensor, below: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the rows first at their bounds on the way from v to the target, and the share of it until there."""
    v, free, _ = state
    room = torch.where(below, v / (v - target), torch.where(above, (problem.upper - v) / (target - v), 1.0))
    share = room.amin(-1, keepdim=True)
    rows = (below | above) & (room <= share * (1.0 + TIED))
    # One row stays free, to tell the level.
    return rows & ((rows != free).any(-1, keepdim=True) | (free.cumsum(-1) > 1)), share


def _released(
    problem: _Problem, state: _State, gradient: Tensor, level: Tensor, share: Tensor
) -> tuple[_State, Tensor]:
    """Frees the rows on either side (at 0, at the cap) that violate optimality by at least `share` of the side's worst;
    returns the state, and whether there are any, `[N, 1]`: none at the optimum."""
    price, on, cap = problem.price, problem.on, problem.cap
    # Where the only free row is at a bound as well, it is held too, and the level is that at which the worst pair of a
    # row at its cap and a row at 0 violates optimality alike.
    weight = price * state.v
    last = state.free & (_count(state.free) == 1.0) & (cap < problem.mass)
    last &= (weight <= ROUNDING) | (weight >= cap - ROUNDING)
    corner = last.any(-1, keepdim=True)
    free, at_cap = state.free & ~last, state.at_cap | (last & (weight > ROUNDING))
    at_zero = on & ~free & ~at_cap
    ratio = gradient / torch.where(on, price, 1.0)
    high = torch.where(at_cap, ratio, -torch.inf).argmax(-1, keepdim=True)
    low = torch.where(at_zero, ratio, torch.inf).argmin(-1, keepdim=True)
    pair = (gradient.gather(-1, high) + gradient.gather(-1, low)) / (price.gather(-1, high) + price.gather(-1, low))
    optimal = corner & ~(at_cap.any(-1, keepdim=True) & at_zero.any(-1, keepdim=True))

    slack = gradient - torch.where(corner, pair, level) * price
    violation = torch.where(at_cap, slack, torch.where(at_zero, -slack, 0.0)).clamp(min=0.0)
    worst = violation.amax(-1, keepdim=True)
    better = ~optimal & (worst > OPTIMAL * state.v.sum(-1, keepdim=True))
    worst_at_cap = torch.where(at_cap, violation, 0.0).amax(-1, keepdim=True)
    worst_at_zero = torch.where(at_zero, violation, 0.0).amax(-1, keepdim=True)
    released = (violation > 0.0) & (violation >= share * torch.where(at_cap, worst_at_cap, worst_at_zero))
    return _State(state.v, free | released, at_cap & ~released), better


def _cholesky(matrix: Tensor, ridge: Tensor, on: Tensor, may_grow: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factor of the matrices of the rows `on`, with the ridge, and the ridge: where it `may_grow` it is so
    much larger than given that at least half of it is left on the factor's diagonal."""
    pairs = on.unsqueeze(-1) & on.unsqueeze(-2)
    matrix = torch.where(pairs, matrix, 0.0)
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(torch.where(on, ridge, 1.0)))
        left = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1, keepdim=True)
        grows = may_grow & ~((info.unsqueeze(-1) == 0) & (left >= 0.5 * ridge))
        if not bool(grows.any()):
            return factor, ridge
        ridge = torch.where(grows, 4.0 * ridge, ridge)


def _count(rows: Tensor) -> Tensor:
    """Returns how many rows `[N, K]` are true, `[N, 1]` float64."""
    return rows.to(torch.float64).sum(-1, keepdim=True)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the product of each `[K, K]` with its `[K]`, every entry summed in the same order."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)
