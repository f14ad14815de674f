"""From weights of languages to whole units in a window: what the schedule and the mixture share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Random streams that must not overlap: the first word of a spawn key.
ROUNDING, PLACES, SAMPLES, MIXTURE = range(4)


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Returns the source of randomness of a stream, which begins with one of the words above."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


def of_places(weights: NDArray[np.float64], slots: int) -> NDArray[np.float64]:
    """Returns what each language with data is due in a window (rule 2 of the schedule), `[K]`, summing to `slots`.

    Languages that would lie beyond the limit of 1 are set to it, and the rest is divided among the others, until none
    lies beyond (water filling).
    """
    share = np.ones(len(weights))
    free = np.ones(len(weights), dtype=bool)
    is_beyond = np.less if slots >= len(weights) else np.greater
    while free.any():
        share[free] = weights[free] * (slots - np.count_nonzero(~free)) / weights[free].sum()
        beyond = free & is_beyond(share, 1.0)
        if not beyond.any():
            break
        share[beyond] = 1.0
        free &= ~beyond
    return share


def split(share: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the whole part and the fraction of shares; one within 1e-9 of a whole number counts as that number."""
    whole = np.floor(share + 1e-9)
    fraction = np.where(share - whole > 1e-9, share - whole, 0.0)
    return whole.astype(np.int64), fraction


def rounded_up(
    fraction: NDArray[np.float64], number: int, credit: NDArray[np.float64], draws: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Returns which languages get a unit more than the whole part of their share (rule 3): those with the most credit
    and luck. The credit `[K]` is changed by what they were promised and what they got.

    Args:
        fraction: `[K]`, of the shares.
        number: how many.
        credit: `[K]`, written.
        draws: `[K]`, from [0, 1).
    """
    credit += fraction
    claim = np.where(fraction > 0, credit + draws, -np.inf)
    chosen = np.argpartition(-claim, number - 1)[:number]
    credit[chosen] -= 1
    return chosen
