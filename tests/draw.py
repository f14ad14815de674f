"""What a run tests of more combinations than it has time for: drawn anew every time, from one seed.

`BUCKETMOO_TEST_SEED` sets the seed; the head of the output and every failure name it. Nothing is left to chance that
has to be there: `pairwise` lets every two values meet, `one_world_size` keeps every case. The whole lists are marked
`nightly`.
"""

from __future__ import annotations

import inspect
import itertools
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

# Processes that share a run's tests draw the same ones.
SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
os.environ["BUCKETMOO_TEST_SEED"] = str(SEED)

Case = dict[str, Any]
Key = tuple[int, str]  # world size, name


def pairwise(
    factors: Mapping[str, Sequence[Any]], never: Iterable[Callable[..., bool]] = (), *, seed: object = SEED
) -> list[Case]:
    """Returns cases, a value for every factor, in which every two values of two factors meet that may meet.

    Args:
        factors: the values of each.
        never: what cannot be; each is asked with the values of the factors that its arguments are named after.
    """
    draw = random.Random(str(seed))
    rules = [(set(inspect.signature(rule).parameters), rule) for rule in never]
    left = {
        frozenset(((one, i), (other, j)))
        for (one, ones), (other, others) in itertools.combinations(factors.items(), 2)
        for i in range(len(ones))
        for j in range(len(others))
    }

    def allowed(chosen: Mapping[str, int], changed: str) -> bool:
        return not any(
            changed in names
            and names <= chosen.keys()
            and rule(**{name: factors[name][chosen[name]] for name in names})
            for names, rule in rules
        )

    def filled(start: Iterable[tuple[str, int]]) -> dict[str, int] | None:
        """Each of the other factors takes the value that meets most for the first time."""
        chosen = dict(start)
        if not all(allowed(chosen, name) for name in chosen):
            return None
        rest = [name for name in factors if name not in chosen]
        for name in draw.sample(rest, len(rest)):
            best: list[tuple[float, int]] = []
            for index in range(len(factors[name])):
                if allowed(chosen | {name: index}, name):
                    new = sum(frozenset(((name, index), each)) in left for each in chosen.items())
                    best.append((new + draw.random(), index))
            if not best:
                return None
            chosen[name] = max(best)[1]
        return chosen

    cases = []
    while left:
        pair = draw.choice(sorted(map(sorted, left)))
        chosen = next(filter(None, (filled(pair) for _ in range(20))), None)
        if chosen is None:  # these two never meet
            left.discard(frozenset(map(tuple, pair)))
            continue
        left -= {frozenset(both) for both in itertools.combinations(chosen.items(), 2)}
        cases.append({name: factors[name][index] for name, index in chosen.items()})
    return cases


def one_world_size(keys: Iterable[Key]) -> set[Key]:
    """Returns each name with one of its world sizes."""
    sizes: dict[str, list[int]] = {}
    for world_size, name in keys:
        sizes.setdefault(name, []).append(world_size)
    draw = random.Random(f"{SEED}/world sizes")
    return {(draw.choice(each), name) for name, each in sizes.items()}


def examples(number: int) -> int:
    """Returns how many examples of a property hypothesis draws."""
    return number * int(os.environ.get("BUCKETMOO_TEST_EXAMPLES", "1"))


def few(values: Sequence[Any], number: int, of: str) -> tuple[Any, ...]:
    """Returns that many drawn ones of the values of a factor, in their order; `of` tells draws apart."""
    drawn = random.Random(f"{SEED}/{of}").sample(range(len(values)), number)
    return tuple(values[index] for index in sorted(drawn))


def some(cases: Sequence[tuple[Any, ...]], number: int) -> list[Any]:
    """Returns parameters of a test, of which all but that many drawn ones are for the nightly list."""
    drawn = set(random.Random(f"{SEED}/{len(cases)}").sample(range(len(cases)), number))
    return [
        pytest.param(*case, marks=() if index in drawn else pytest.mark.nightly) for index, case in enumerate(cases)
    ]


def parametrized(keys: Iterable[Key], drawn: Iterable[Key]) -> pytest.MarkDecorator:
    """`key` is each of `keys`; those that are not drawn are for the nightly list."""
    chosen = set(drawn)
    return pytest.mark.parametrize(
        "key",
        [
            pytest.param(key, id=f"W{key[0]}-{key[1]}", marks=() if key in chosen else pytest.mark.nightly)
            for key in keys
        ],
    )
