"""Which half of its language's micro-batches each one counts for, by the rule of `bucketmoo_ds/pipeline/halves.py`."""

from __future__ import annotations

from collections.abc import Sequence

Slots = Sequence[Sequence[tuple[int, int]]]  # [M][W]: language, target tokens


def halves_by_rule(slots: Slots, *, sticks: bool = False, apart: bool = False) -> list[list[int]]:
    """Returns `[M][W]`: the larger ones of a micro-step first, each goes where its language has fewer tokens so far.

    Args:
        sticks: whether a rank stays in a half that it has;
        apart: unless the other is empty.
    """
    filled: dict[tuple[int, int], int] = {}
    has: dict[tuple[int, int], set[int]] = {}
    found = []
    for row in slots:
        halves = [0] * len(row)
        for tokens, rank, language in sorted((-tokens, rank, language) for rank, (language, tokens) in enumerate(row)):
            if tokens == 0:
                continue
            of_rank = has.setdefault((rank, language), set())
            first, second = filled.get((language, 0), 0), filled.get((language, 1), 0)
            half = int(second < first)
            stays = sticks and of_rank and not (apart and min(first, second) == 0)
            if stays and half not in of_rank:
                half = 1 - half
            of_rank.add(half)
            halves[rank] = half
            filled[language, half] = filled.get((language, half), 0) - tokens
        found.append(halves)
    return found
