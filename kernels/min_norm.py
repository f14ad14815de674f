"""The min-norm weights, one program a block, in float64: `bucketmoo_ds.ops.backends.min_norm`, where the method, its
words and its constants are explained. The equations of the free rows are solved by their inverse (Gauss and Jordan)
instead of a Cholesky factor: a matrix in registers has no rows to walk, but takes a rank-one update in one step."""

import triton
import triton.language as tl

from bucketmoo_ds.kernels.arguments import ARGUMENTS
from bucketmoo_ds.ops.backends import min_norm

ZERO_ROW = tl.constexpr(min_norm.ZERO_ROW)
RIDGE = tl.constexpr(min_norm.RIDGE)
OPTIMAL = tl.constexpr(min_norm.OPTIMAL)
ABOUT_AS_BAD = tl.constexpr(min_norm.ABOUT_AS_BAD)
TIED = tl.constexpr(min_norm.TIED)
ROUNDING = tl.constexpr(min_norm.ROUNDING)
LIFT = tl.constexpr(min_norm.LIFT)
# Each takes three digits off the error that a ridge of 1e-13 lets rounding make, as there; but an inverse errs in all
# directions, and not only among equal rows, so that more are needed.
REFINEMENTS = tl.constexpr(5)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=ARGUMENTS)
def min_norm_kernel(gram, mask, weights, finite, cap_bits, count, ROWS: tl.constexpr):
    """Solves a block. gram: `[B, count, count]` float64. mask: `[B, count]` int8. weights: `[B, count]` float64.
    finite: `[B]` int8. cap_bits: those of the largest weight, a float64, which Triton would pass as a float32. `ROWS`
    is count, padded."""
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    chosen = tl.load(mask + block * count + row, mask=row < count, other=0) != 0
    pairs = chosen[:, None] & chosen[None, :]
    # By columns, which gives each thread few rows: a vector by row, of which there are a dozen, takes few registers.
    matrix = tl.load(gram + (block * count + row[None, :]) * count + row[:, None], mask=pairs, other=0.0)
    is_finite = not any_of(tl.max((matrix - matrix != 0.0).to(tl.int32), axis=1) != 0)
    # As zero rows, rows that are not finite share their weight evenly.
    matrix = tl.where(is_finite, matrix, 0.0)
    largest = tl.max(diagonal_of(matrix, row))
    matrix = matrix / tl.where(largest > 0.0, largest, 1.0)
    squares = diagonal_of(matrix, row)
    norms = tl.sqrt(tl.maximum(squares, 0.0))

    max_weight = cap_bits.to(tl.int64).to(tl.float64, bitcast=True)
    cap = tl.maximum(1.0 / tl.maximum(count_of(chosen), 1.0), max_weight)
    nonzero = norms > ZERO_ROW
    zero = chosen & (norms <= ZERO_ROW)
    zeros = count_of(zero)
    result = tl.where(zero, tl.minimum(1.0 / tl.maximum(zeros, 1.0), cap), 0.0)
    mass = tl.where(zeros * cap >= 1.0, 0.0, 1.0 - zeros * cap)
    others = tl.where(mass > 0.0, count_of(nonzero), 0.0)
    if others == 1.0:
        result += tl.where(nonzero, mass, 0.0)
    elif others == 2.0:
        result += two(matrix, squares, nonzero, mass, cap, row, ROWS)
    elif others > 2.0:
        result += active_set(matrix, norms, nonzero, mass, cap, row, ROWS)
    tl.store(weights + block * count + row, result, mask=row < count)
    tl.store(finite + block, is_finite.to(tl.int8))


@triton.jit
def two(matrix, squares, on, mass, cap, row, ROWS: tl.constexpr):
    first = row == tl.min(tl.where(on, row, ROWS))
    second = row == tl.max(tl.where(on, row, -1))
    product = tl.sum(tl.where(first, tl.sum(tl.where(second[None, :], matrix, 0.0), axis=1), 0.0))
    to_first = pick(squares, second) - product
    to_second = pick(squares, first) - product
    distance = to_first + to_second
    share = tl.where(distance > 0.0, to_first / tl.where(distance > 0.0, distance, 1.0), 0.5)
    share = tl.minimum(tl.maximum(share * mass, mass - cap), cap)
    share = tl.minimum(tl.maximum(share, 0.0), mass)
    return tl.where(first, share, tl.where(second, mass - share, 0.0))


@triton.jit
def active_set(matrix, norms, on, mass, cap, row, ROWS: tl.constexpr):
    divisor = tl.where(on, norms, 1.0)
    cosines = matrix / (divisor[:, None] * divisor[None, :])
    cosines = tl.where(on[:, None] & on[None, :], cosines, 0.0)
    price = tl.where(on, tl.min(tl.where(on, norms, INFINITY)) / divisor, 0.0)
    upper = tl.where(only_if(cap < mass, on), cap / tl.where(on, price, 1.0), INFINITY)
    _, ridge = inverse(cosines, tl.full([], RIDGE, tl.float64), on, mass > 0.0, row, ROWS)

    v = tl.zeros([ROWS], tl.float64)
    free = on
    at_cap = v > 0.0
    before_v, before_free, before_at_cap = v, free, at_cap
    shortest = tl.full([], INFINITY, tl.float64)
    bold = mass > 0.0
    going = mass > 0.0
    about_v = mass < 0.0
    steps = 0
    while going and steps < 24 * ROWS + 96:
        steps += 1
        target, level, ridge = among_free(cosines, ridge, about_v, price, mass, v, free, row, ROWS)
        # A single free row has no choice: what it is out of its bounds is rounding.
        several = only_if(count_of(free) > 1.0, free)
        below = several & (target < 0.0)
        above = several & (target > upper)
        stopped = any_of(below | above)

        blocking, length = first_at_bounds(v, free, target, upper, below, above, row, ROWS)
        held = tl.where(bold, outside(price, target, upper, below, above), blocking)
        moved = v + tl.where(bold, 1.0, length) * (target - v)
        moved = tl.where(free, tl.minimum(tl.maximum(moved, 0.0), upper), v)
        moved = tl.where(held, tl.where(below, 0.0, upper), moved)
        moved_free = free & (held == 0)
        moved_at_cap = at_cap | (held & above)

        gradient = times(cosines, moved) + tl.where(about_v, 0.0, ridge) * moved
        square = tl.sum(gradient * moved)
        failed = bold & (stopped == 0) & (square >= shortest)
        released_free, released_at_cap, better = released(
            price, on, mass, cap, moved, moved_free, moved_at_cap, gradient, level, bold, row, ROWS
        )
        unsettled = about_v & (ridge * tl.max(tl.abs(moved - v)) > OPTIMAL * tl.sum(moved))
        optimal = (stopped | failed | unsettled | better) == 0
        begins = optimal & (about_v == 0) & (ridge > RIDGE)
        stays = stopped | unsettled | begins
        v = tl.where(failed, before_v, moved)
        free = tl.where(stays, moved_free, tl.where(failed, before_free, released_free))
        at_cap = tl.where(stays, moved_at_cap, tl.where(failed, before_at_cap, released_at_cap))
        accepted = (stopped | failed | optimal) == 0
        before_v = tl.where(accepted, v, before_v)
        before_free = tl.where(accepted, free, before_free)
        before_at_cap = tl.where(accepted, at_cap, before_at_cap)
        shortest = tl.where(accepted, square, shortest)
        bold = bold & ((failed | begins) == 0)
        about_v = about_v | begins
        going = (optimal == 0) | begins
    result = price * v
    return tl.minimum(result * (mass / tl.sum(result)), cap)


@triton.jit
def among_free(cosines, ridge, about_v, price, mass, v, free, row, ROWS: tl.constexpr):
    """Returns the best lengths of the free rows beside the others' v, 0 for these, their level, and the ridge."""
    held = tl.where(free, 0.0, v)
    paid = tl.where(free, price, 0.0)
    lift = tl.where(about_v, LIFT / tl.sum(paid * paid), 0.0)
    ridge = tl.where(about_v, tl.maximum(ridge / 64.0, RIDGE), ridge)
    inverted, ridge = inverse(cosines + lift * paid[:, None] * paid[None, :], ridge, free, about_v, row, ROWS)
    pull = tl.where(free, times(cosines, held) - tl.where(about_v, ridge, 0.0) * v, 0.0)
    ahead = tl.zeros([ROWS], tl.float64)
    back = tl.zeros([ROWS], tl.float64)
    for _ in range(1 + REFINEMENTS):
        product = times(cosines, ahead) + lift * tl.sum(paid * ahead) * paid
        ahead += times(inverted, tl.where(free, paid - product - ridge * ahead, 0.0))
        product = times(cosines, back) + lift * tl.sum(paid * back) * paid
        back += times(inverted, tl.where(free, pull - product - ridge * back, 0.0))
    rest = mass - tl.sum(price * held)
    level = (rest + tl.sum(price * back)) / tl.sum(price * ahead)
    return level * ahead - back, level - lift * rest, ridge


@triton.jit
def inverse(given, ridge, on, may_grow, row, ROWS: tl.constexpr):
    """Returns the inverse of the matrix of the rows `on`, with the ridge, 0 elsewhere, and the ridge: if it `may_grow`,
    it is so much larger than given that at least half of it is left on the diagonal of Cholesky's factor."""
    matrix, left = inverse_of(given, ridge, on, row, ROWS)
    while may_grow & (left < 0.5 * ridge):
        ridge *= 4.0
        matrix, left = inverse_of(given, ridge, on, row, ROWS)
    return matrix, ridge


@triton.jit
def inverse_of(given, ridge, on, row, ROWS: tl.constexpr):
    """Returns the inverse, and the smallest pivot, which is that of Cholesky."""
    matrix = tl.where(on[:, None] & on[None, :], given, 0.0)
    matrix += tl.where((row[:, None] == row[None, :]) & on[:, None], ridge, 0.0)
    smallest = tl.full([], INFINITY, tl.float64)
    for index in range(ROWS):
        here = row == index
        if any_of(here & on):
            column = tl.sum(tl.where(here[None, :], matrix, 0.0), axis=1)
            pivot = pick(column, here)
            smallest = tl.minimum(smallest, pivot)
            scale = 1.0 / tl.where(pivot > 0.0, pivot, 1.0)
            # The row is the column, but for the sign where the other row is inverted already.
            across = tl.where(row < index, -column, column)
            left = tl.where(here, -1.0, column)
            right = tl.where(here, 1.0, across) * scale
            matrix = tl.where(here[:, None] | here[None, :], 0.0, matrix) - left[:, None] * right[None, :]
    return matrix, smallest


@triton.jit
def outside(price, target, upper, below, above):
    """Returns the rows out of bounds on the side where more weight is."""
    under = tl.sum(tl.where(below, -price * target, 0.0))
    over = tl.sum(tl.where(above, price * (target - upper), 0.0))
    return tl.where(under >= over, below, above)


@triton.jit
def first_at_bounds(v, free, target, upper, below, above, row, ROWS: tl.constexpr):
    """Returns the rows first at their bounds on the way from v to the target, and the share of it until there."""
    room = tl.where(below, v / (v - target), tl.where(above, (upper - v) / (target - v), 1.0))
    share = tl.min(room)
    rows = (below | above) & (room <= share * (1.0 + TIED))
    # One row stays free, to tell the level.
    others = any_of(free & (rows == 0))
    spared = tl.where(others, ROWS, tl.min(tl.where(free, row, ROWS)))
    return rows & (row != spared), share


@triton.jit
def released(price, on, mass, cap, v, free, at_cap, gradient, level, bold, row, ROWS: tl.constexpr):
    """Frees the rows on either side that violate optimality most, or boldly about as much; returns the free rows, those
    at their cap, and whether any violates it."""
    # Where the only free row is at a bound as well, it is held too, and the level is that at which the worst pair of a
    # row at its cap and a row at 0 violates optimality alike.
    weight = price * v
    last = only_if((count_of(free) == 1.0) & (cap < mass), free)
    last = last & ((weight <= ROUNDING) | (weight >= cap - ROUNDING))
    corner = any_of(last)
    free = free & (last == 0)
    at_cap = at_cap | (last & (weight > ROUNDING))
    at_zero = on & (free == 0) & (at_cap == 0)
    ratio = gradient / tl.where(on, price, 1.0)
    high = first_largest(tl.where(at_cap, ratio, -INFINITY), row, ROWS)
    low = first_largest(tl.where(at_zero, -ratio, -INFINITY), row, ROWS)
    pair = (pick(gradient, high) + pick(gradient, low)) / (pick(price, high) + pick(price, low))
    optimal = corner & ((any_of(at_cap) & any_of(at_zero)) == 0)

    slack = gradient - tl.where(corner, pair, level) * price
    violation = tl.maximum(tl.where(at_cap, slack, tl.where(at_zero, -slack, 0.0)), 0.0)
    better = (optimal == 0) & (tl.max(violation) > OPTIMAL * tl.sum(v))
    share = tl.where(bold, ABOUT_AS_BAD, 1.0)
    worst_at_cap = tl.max(tl.where(at_cap, violation, 0.0))
    worst_at_zero = tl.max(tl.where(at_zero, violation, 0.0))
    rows = (violation > 0.0) & (violation >= share * tl.where(at_cap, worst_at_cap, worst_at_zero))
    return free | rows, at_cap & (rows == 0), better


@triton.jit
def diagonal_of(matrix, row):
    return tl.sum(tl.where(row[:, None] == row[None, :], matrix, 0.0), axis=1)


@triton.jit
def times(matrix, vector):
    return tl.sum(matrix * vector[None, :], axis=1)


@triton.jit
def first_largest(values, row, ROWS: tl.constexpr):
    return row == tl.min(tl.where(values == tl.max(values), row, ROWS))


@triton.jit
def pick(values, where):
    return tl.sum(tl.where(where, values, 0.0))


@triton.jit
def count_of(rows):
    return tl.sum(rows.to(tl.float64))


@triton.jit
def only_if(condition, rows):
    return tl.where(condition, rows, False)


@triton.jit
def any_of(rows):
    return tl.max(rows.to(tl.int32)) != 0
