"""Anchor: follow one or a few primary languages, and leave to every other one a share of its own progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._cone import project
from bucketmoo_ds.aggregate._definite import times
from bucketmoo_ds.aggregate._scaling import positive_semidefinite, unit_rows
from bucketmoo_ds.aggregate.base import State, Stateful, check_number, register
from bucketmoo_ds.aggregate.dualproj import CANCELLED
from bucketmoo_ds.aggregate.mean import uniform
from bucketmoo_ds.errors import ConfigError, did_you_mean
from bucketmoo_ds.transfer import to_device

# How long the added coordinate of `nearest` is, beside rows of norm 1.
STIFF = 32.0
STEPS = 3
# A combined row shorter than this times its parts is 0: of its square, rounding is then a millionth.
VANISHED = 1e-5


@register("anchor")
@dataclasses.dataclass(frozen=True)
class Anchor(Stateful):
    """Priority-constrained descent (Not All Objectives Are Born Equal, TMLR 2026, arXiv 2606.29521).

    Rows are divided by the root of the moving average of their squared norms, `h_j = g_j / sqrt(v_j)`. Then d is the
    nearest vector to h_1, the primary language's, that gives every other language a share of what a step along its own
    row would: `argmin |d - h_1|^2 : <h_j, d> >= tau |h_j|^2`, scaled to the norm of g_1. With several primary languages
    h_1 is the mean of their h, and d has the norm of the mean of their rows; where none took part in a window, all
    count as primary. For adding languages without losing old ones, make those primary that must not be lost.

    The moving averages, K a block, are the state, corrected for their start as the paper does. Gradients shrink while a
    model learns, and Grams come without a scale here: the squared norms of a window are first brought to the sum that
    the same languages have in the averages. TorchJD's weights where that sum does not change, but for its `eps`.

    A zero row demands nothing and gets 0. Where h_1 is 0 or d cancels to rounding, the weights are 0. Where no d gives
    every language its share, or only one so long that it would give half of it, h_1 alone is followed, as in the paper;
    so opposed languages can be harmed.

    Guarantee by block: `<g_j, d> >= tau |g_j| |d| |h_j| / |d_1|` for all that are not primary, d_1 the d before it is
    scaled, unless no d does. None for the primary: what the others demand comes first, and where one opposes it nearly,
    d may go uphill for it, at full length. Three problems of `min_norm` with K + 1 rows at the most.

    Args:
        primary: the name of a language, or several; where there are no names, the numbers of rows.
        tau: the share, from 0 to 1.
        beta: the share in [0, 1) that a moving average keeps.
    """

    primary: str | int | Sequence[str | int]
    tau: float = 0.02
    beta: float = 0.999

    def __post_init__(self) -> None:
        for each in self._primaries():
            if isinstance(each, bool) or not isinstance(each, str | int):
                raise _error(self.primary, "expected the name of a language, or a list of names")
        if not self._primaries():
            raise _error(self.primary, "expected at least one language")
        check_number("anchor", "tau", self.tau, 0.0, 1.0 + 1e-12)
        check_number("anchor", "beta", self.beta, 0.0, 1.0)

    def at(self, languages: Sequence[str], present: Sequence[int], blocks: Sequence[int]) -> Anchor:
        """See `Aggregator.at`.

        Raises:
            ConfigError: a primary language is none of the run's.
        """
        numbers = []
        for each in self._primaries():
            if isinstance(each, str) and each not in languages:
                raise _error(each, f"no language of this run{did_you_mean(each, languages)}")
            number = list(languages).index(each) if isinstance(each, str) else each
            if not 0 <= number < len(languages):
                raise _error(each, f"no number of {len(languages)} languages")
            numbers.append(number)
        here = [place for place, number in enumerate(present) if number in numbers]
        found = object.__new__(Anchor)  # unchecked: none may be present
        for name, value in (("primary", here), ("tau", self.tau), ("beta", self.beta)):
            object.__setattr__(found, name, value)
        return found

    def start(self, languages: int) -> State:
        """See `Stateful.start`: sums of squared norms, and of the shares that they have in it."""
        return {name: torch.zeros(languages, dtype=torch.float64) for name in ("squares", "shares")}

    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """See `Stateful.step`.

        Raises:
            ConfigError: rows have no names, and this is none of their numbers.
        """
        cosines, norms, nonzero = unit_rows(gram, mask)
        cosines = positive_semidefinite(cosines, nonzero)
        new = self._averages(norms.square(), mask, state)
        average = new["squares"] / torch.where(new["shares"] > 0.0, new["shares"], 1.0)
        unit = torch.where(nonzero & (average > 0.0), average, 1.0).sqrt()
        sizes = torch.where(nonzero, norms, 0.0) / unit / self._growth(norms.square(), mask, state).sqrt()

        primary = self._mask(mask)
        anyone = (primary & mask).any(-1, keepdim=True)
        primary = torch.where(anyone, primary & mask, mask)
        share = uniform(primary)
        parts = share * sizes
        length = _norm(cosines, parts)
        moves = length > CANCELLED * parts.sum(-1, keepdim=True)
        length = torch.where(moves, length, 1.0)
        others = nonzero & ~torch.where(anyone, primary, False)
        least = torch.where(others, self.tau * sizes / length, 0.0)
        added = nearest(cosines, times(cosines, parts) / length, least, others & moves)
        found = parts + length * added

        got, wanted = _norm(cosines, found), _norm(cosines, share * norms)
        moves &= got > VANISHED * found.sum(-1, keepdim=True)
        scaled = torch.where(moves & nonzero, found * wanted / torch.where(moves, got, 1.0), 0.0)
        return scaled / torch.where(nonzero, norms, 1.0), new

    def _growth(self, squares: Tensor, mask: Tensor, state: State) -> Tensor:
        """Returns `[B, 1]`, how many times as large a window's squares are as the averages of the same languages."""
        both = mask & (state["shares"] > 0.0)
        before = state["squares"] / torch.where(both, state["shares"], 1.0)
        old, now = (torch.where(both, each, 0.0).sum(-1, keepdim=True) for each in (before, squares))
        return torch.where((old > 0.0) & (now > 0.0), now / torch.where(old > 0.0, old, 1.0), 1.0)

    def _averages(self, squares: Tensor, mask: Tensor, state: State) -> State:
        brought = squares / self._growth(squares, mask, state)
        taken = {"squares": brought, "shares": torch.ones_like(brought)}
        return {name: self.beta * state[name] + (1.0 - self.beta) * each for name, each in taken.items()}

    def _mask(self, mask: Tensor) -> Tensor:
        flags = [False] * mask.shape[-1]
        for each in self._primaries():
            if isinstance(each, str) or not 0 <= each < len(flags):
                raise _error(each, f"expected numbers of {len(flags)} rows, which have no names here")
            flags[each] = True
        return to_device(flags, torch.bool, mask.device)

    def _primaries(self) -> list[str | int]:
        return [self.primary] if isinstance(self.primary, str | int) else list(self.primary)


def nearest(cosines: Tensor, to_rows: Tensor, least: Tensor, on: Tensor) -> Tensor:
    """Returns what of unit rows u_j is added to a unit vector t by its projection onto `{d : <u_j, d> >= b_j}`, or 0
    where that is empty.

    With one coordinate more that polyhedron is where the cone `{(d, s) : <u_j, d> >= b_j s / M}` has `s = M`, and the
    projection of (t, c) onto the cone is that of t onto `{d : <u_j, d> >= b_j s / M}` for the s that it has. So c is
    searched such that `s = M`. It is not less than M, s is linear in it as long as the same rows are added, and steps
    along the last secant find it; an s that is a little less is the answer to as much smaller b_j.

    Args:
        cosines: `[B, K, K]`.
        to_rows: `[B, K]`, `<u_j, t>`.
        least: `[B, K]`, b_j, 0 or more.
        on: `[B, K]` bool, the rows that count.
    """
    stiff = STIFF * least.amax(-1, keepdim=True).clamp(min=1.0)
    slope = torch.where(on, least / stiff, 0.0)
    heights = (1.0 + slope.square()).sqrt()
    extended = (cosines + slope.unsqueeze(-1) * slope.unsqueeze(-2)) / heights.unsqueeze(-1) / heights.unsqueeze(-2)
    own = torch.zeros(1, on.shape[-1] + 1, dtype=torch.bool, device=on.device)
    own[:, -1] = True
    all_on = torch.cat([on, torch.ones_like(on[:, :1])], -1)

    def at(height: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to (t, c), and s."""
        size = (1.0 + height.square()).sqrt()
        with_rows = torch.where(on, (to_rows - slope * height) / size / heights, 0.0).unsqueeze(-2)
        last = torch.cat([with_rows, torch.ones_like(with_rows[..., :1])], -1)
        both = torch.cat([torch.cat([extended, with_rows.mT], -1), last], -2)
        added = torch.where(on, project(both, all_on, last, own)[:, 0, :-1] * size / heights, 0.0)
        return added, height - (added * slope).sum(-1, keepdim=True)

    height = stiff
    added, reached = at(height)
    rise = torch.ones_like(stiff)
    for _ in range(STEPS - 1):
        before, was = height, reached
        height = height + (stiff - reached).clamp(min=0.0) / rise
        added, reached = at(height)
        moved = height - before
        rise = torch.where(moved > 0.0, (reached - was) / torch.where(moved > 0.0, moved, 1.0), 1.0).clamp(1e-3, 1.0)
    return torch.where(reached > 0.5 * stiff, added, 0.0)


def _norm(cosines: Tensor, weights: Tensor) -> Tensor:
    """Returns `[B, 1]`, the norms of the sums of unit rows."""
    return (weights * times(cosines, weights)).sum(-1, keepdim=True).clamp(min=0.0).sqrt()


def _error(found: object, expected: str) -> ConfigError:
    return ConfigError(f'aggregator "anchor": primary: {found!r}: {expected}')
