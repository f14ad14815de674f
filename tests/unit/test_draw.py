"""What is drawn lacks nothing that may be there."""

from __future__ import annotations

import itertools
import random

from draw import one_world_size, pairwise


def test_any_two_values_meet_that_may_and_none_that_may_not() -> None:
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    factors = {name: tuple(range(draw.randint(1, 5))) for name in "abcdef"}

    def never(a: int, b: int) -> bool:
        return a == 0 and b == 0

    cases = pairwise(factors, [never], seed=seed)
    met = {
        (one, case[one], other, case[other]) for case in cases for one, other in itertools.combinations(factors, 2)
    }
    wanted = {
        (one, i, other, j)
        for one, other in itertools.combinations(factors, 2)
        for i, j in itertools.product(factors[one], factors[other])
    }
    # With one value of `a` and one of `b` there is no case at all; with one of either, values of the other are barred.
    barred = {
        pair
        for pair in wanted
        if (pair[1] == 0 and pair[3] == 0 and {pair[0], pair[2]} == {"a", "b"})
        or any(
            len(factors[other]) == 1 and (name, 0) in ((pair[0], pair[1]), (pair[2], pair[3]))
            for name, other in (("a", "b"), ("b", "a"))
        )
        or len(factors["a"]) == len(factors["b"]) == 1
    }
    assert met == wanted - barred, f"seed {seed}"
    assert len(cases) < len(list(itertools.product(*factors.values()))) or len(cases) <= 25
    assert cases == pairwise(factors, [never], seed=seed)


def test_every_name_keeps_one_world_size() -> None:
    keys = [(world_size, name) for world_size in (1, 2, 3) for name in "abc"] + [(4, "d")]
    chosen = one_world_size(keys)
    assert chosen <= set(keys)
    assert sorted(name for _, name in chosen) == ["a", "b", "c", "d"]
