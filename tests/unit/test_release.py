"""The order in which buckets leave: one on all ranks, whatever each completes or misses; learned once, and kept."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulated_ranks import SimulatedExchange, run_ranks

from bucketmoo_ds.adapters.release import Release
from bucketmoo_ds.comm.exchange import Exchange

MicroStep = list[list[int]]  # of each rank: the buckets in the order in which they are complete


@st.composite
def micro_steps(draw: st.DrawFn) -> tuple[int, int, list[MicroStep]]:
    """Buckets, ranks, and what each rank completes in some micro-steps; ranks need not be alike."""
    count, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 3))

    def completed() -> list[int]:
        order = draw(st.permutations(range(count)))
        return list(order[: draw(st.integers(0, count))])

    return count, ranks, [[completed() for _ in range(ranks)] for _ in range(draw(st.integers(1, 4)))]


def orders(count: int, steps: list[MicroStep]) -> list[list[int]]:
    """By the definition: the plan's until a micro-step in which rank 0 completes a bucket; then what it has shown, and
    those that it has not in the plan's."""
    shown = next((number for number, step in enumerate(steps) if step[0]), len(steps))
    first = steps[shown][0] if steps[shown:] else []
    learned = [*first, *(each for each in range(count) if each not in first)]
    return [list(range(count)) if number <= shown else learned for number in range(len(steps))]


@settings(deadline=None, max_examples=60)
@given(case=micro_steps())
def test_all_ranks_hand_on_in_one_order(case: tuple[int, int, list[MicroStep]]) -> None:
    count, ranks, steps = case
    expected = orders(count, steps)

    def body(exchange: SimulatedExchange) -> None:
        left: list[int] = []
        release = Release(count, exchange, left.append)
        for order, step in zip(expected, steps, strict=True):
            left.clear()
            release.start()
            mine = step[exchange.rank]
            for number, bucket in enumerate(mine, start=1):
                assert not release.is_complete(bucket)
                release.complete(bucket)
                ready = next((turn for turn, each in enumerate(order) if each not in mine[:number]), count)
                assert left == order[:ready], "as soon as it is their turn, and no sooner"
                assert [each for each in range(count) if release.has_left(each)] == sorted(left)
                assert [each for each in range(count) if release.is_complete(each)] == sorted(mine[:number])
            release.finish()
            assert left == order
            assert all(release.has_left(each) for each in range(count))
            release.finish()
            assert left == order, "each exactly once"

    for outcome in run_ranks(ranks, body):
        if isinstance(outcome, Exception):
            raise outcome


@settings(deadline=None, max_examples=40)
@given(order=st.permutations(range(5)))
def test_once_learned_no_bucket_waits(order: list[int]) -> None:
    """Ranks of one program complete buckets alike: from the second micro-step on, each leaves as it comes."""
    left: list[int] = []
    release = Release(5, Exchange(), left.append)
    for number in range(3):
        left.clear()
        release.start()
        for position, bucket in enumerate(order):
            release.complete(bucket)
            if number:
                assert left == order[: position + 1]
        release.finish()


def test_the_order_is_asked_for_once() -> None:
    """Agreeing is a collective, which would hold up every micro-step."""
    asked: list[list[int]] = []

    class Noting(Exchange):
        def gather_numbers(self, numbers: Any) -> list[list[int]]:
            asked.append(list(numbers))
            return [list(numbers)]

    release = Release(3, Noting(), lambda bucket: None)
    asked.clear()
    release.finish()  # shows nothing
    assert asked == [[0, 0, 1, 2]]
    for completed in ([2], [1, 0, 2], [0]):
        release.start()
        for bucket in completed:
            release.complete(bucket)
        release.finish()
    assert asked[1:] == [[1, 2, 0, 1]]


@settings(deadline=None, max_examples=40)
@given(case=micro_steps())
def test_inside_is_the_bucket_that_the_framework_completes(case: tuple[int, int, list[MicroStep]]) -> None:
    """Only that one: those that waited for it are done with, and in `finish` all are."""
    count, _, steps = case
    seen: list[tuple[int, int | None]] = []
    release = Release(count, Exchange(), lambda bucket: seen.append((bucket, release.inside)))
    for step in steps:
        release.start()
        for bucket in step[0]:
            seen.clear()
            release.complete(bucket)
            assert release.inside is None
            assert all(inside == bucket for _, inside in seen)
        seen.clear()
        release.finish()
        assert all(inside is None for _, inside in seen)


@pytest.mark.parametrize("at_finish", [False, True])
def test_an_error_on_the_way_is_over_with_the_next_start(at_finish: bool) -> None:
    left: list[int] = []
    failing = True

    def hand_on(bucket: int) -> None:
        if failing:
            raise ZeroDivisionError
        left.append(bucket)

    release = Release(2, Exchange(), hand_on)
    with pytest.raises(ZeroDivisionError):
        release.finish() if at_finish else release.complete(0)
    failing = False
    release.start()
    assert release.inside is None
    assert not release.is_complete(0)
    release.complete(1)
    release.finish()
    assert left == [0, 1]
