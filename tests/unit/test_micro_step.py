"""The life of a micro-step: every transition, and random lives against a small model of what may follow what."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from unit.simulated_ranks import run_ranks

from bucketmoo_ds.adapters.micro_step import MicroStep
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import Entries, LanguageTracker
from bucketmoo_ds.errors import BucketMOOError, DisagreementError, LanguageError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks

CONFIG = BucketMOOConfig(languages=("de", "fr"), aggregator="mean")
PLAN = plan_blocks([Parameter("a", 3)], 99, "bucket")


class Life:
    """A micro-step with the pipeline that it drives; gradients are ones.

    Attributes:
        wanted: M, which may change.
    """

    def __init__(self, micro_steps: int, once_a_window: bool = False, exchange: Exchange | None = None) -> None:
        self.wanted = micro_steps
        self.tracker = LanguageTracker(CONFIG)
        self.moo = BucketMOO(
            CONFIG,
            PLAN,
            exchange or Exchange(),
            lambda bucket, shard: None,
            micro_steps=lambda: self.wanted,
            once_a_window=once_a_window,
        )
        self.micro = MicroStep(self.moo, self.tracker)

    def open(self, language: str = "de", tokens: int = 1, boundary: bool | None = None, **how: Any) -> None:
        self.tracker.note(Entries(language=language, target_tokens=tokens), training=True)
        self.micro.come()
        last = self.moo.window.micro_steps + 1 == self.wanted
        self.micro.open(last if boundary is None else boundary, **how)

    def close(self, bad: bool = False) -> None:
        if self.micro.exchanges:
            size = self.moo.exchange.world_size * self.moo.exchange.shard_numel(3)
            self.moo.ingest(0, torch.full((size,), float("nan") if bad else 1.0))
        self.micro.close([True])

    def window(self, bad: bool = False) -> None:
        for _ in range(self.wanted):
            self.open()
            self.close(bad)
        self.micro.resolve()

    @property
    def state(self) -> tuple[bool, bool, bool, int]:
        micro = self.micro
        return micro.is_open, micro.resolved, micro.unused, self.moo.window.micro_steps


def test_a_window_from_its_first_micro_step_to_its_step() -> None:
    life = Life(2)
    micro = life.micro
    assert life.state == (False, False, False, 0)
    micro.check_step()
    micro.check_not_interrupted()
    life.open("de", 3)
    assert life.state == (True, False, False, 1)
    assert (micro.first, micro.boundary, micro.exchanges) == (True, False, True)
    assert (micro.slot.language, micro.slot.target_tokens, micro.factor) == (0, 3, 1.0)
    life.close()
    assert life.state == (False, False, False, 1)
    with pytest.raises(BucketMOOError, match="after 1 of 2 micro-steps"):
        micro.check_step()
    life.open("fr")
    assert (micro.first, micro.boundary, micro.slot.language) == (False, True, 1)
    life.close()
    micro.resolve()
    assert life.state == (False, True, True, 0)
    micro.check_step()
    micro.use()
    assert life.state == (False, True, False, 0)
    micro.check_step()  # of a second optimizer
    assert not micro.skipped


def test_a_window_that_is_not_finite_is_skipped_until_the_next() -> None:
    life = Life(1)
    for bad in (True, False):
        life.window(bad)
        assert life.micro.skipped == bad


@pytest.mark.parametrize("once_a_window", [False, True])
def test_who_exchanges_and_by_what_factor(once_a_window: bool) -> None:
    life = Life(3, once_a_window)
    factors, exchanges = [], []
    for tokens in (4, 0, 6):
        life.open("de", tokens)
        factors.append(life.micro.factor)
        exchanges.append(life.micro.exchanges)
        life.close()
    assert exchanges == [not once_a_window, not once_a_window, True]
    assert factors == ([1.0, 0.0, 1.5] if once_a_window else [1.0] * 3)


def refused_by_language(life: Life) -> None:
    life.open("xx")


def refused_by_the_wrapper(life: Life) -> None:
    life.open(obstacle=LanguageError("under no_sync()"))


def refused_without_a_forward_pass(life: Life) -> None:
    life.micro.come()
    life.micro.open(False)


def refused_as_too_many(life: Life) -> None:
    life.wanted = 1
    life.open(boundary=False)


REFUSALS: list[tuple[Callable[[Life], None], str]] = [
    (refused_by_language, '"xx" is not in'),
    (refused_by_the_wrapper, "rank 0: under no_sync"),
    (refused_without_a_forward_pass, "a backward without a forward pass"),
    (refused_as_too_many, "micro-step . of 1 does not end its window"),
]


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize(("refuse", "said"), REFUSALS)
def test_a_micro_step_that_is_refused_has_to_be_abandoned(
    refuse: Callable[[Life], None], said: str, before: int
) -> None:
    """In a window's beginning, in its midst, and where the window before is resolved: a gradient has come, and it may
    be in `.grad` by now."""
    life = Life(3)
    for _ in range(before):
        life.open()
        life.close()
    if before == 3:
        life.micro.resolve()
    with pytest.raises(BucketMOOError, match=said):
        refuse(life)
    for check in (life.micro.check_step, life.micro.check_not_interrupted):
        with pytest.raises(BucketMOOError, match=r"call abandon\(\) on every rank"):
            check()
    life.micro.use()  # clearing gradients is not enough: a window's rows may be there
    with pytest.raises(BucketMOOError, match=r"call abandon\(\)"):
        life.micro.check_not_interrupted()
    life.micro.abandon()
    assert life.state == (False, False, False, 0)
    life.wanted = 3
    windows = life.moo.windows
    life.window()
    assert life.moo.windows == windows + 1
    assert life.moo.last.target_tokens == (3, 0), "nothing is left of what was given up"


@pytest.mark.parametrize("when", ["open", "closed", "resolved", "noted"])
def test_abandon_at_any_time(when: str) -> None:
    life = Life(2)
    if when == "resolved":
        life.window()
    elif when == "noted":
        life.tracker.note(Entries(language="fr", target_tokens=7), training=True)
    else:
        life.open("fr", 7)
        if when == "closed":
            life.close()
    life.micro.abandon()
    assert life.state == (False, False, False, 0)
    life.window()
    assert life.moo.last.target_tokens == (2, 0)


@pytest.mark.parametrize("changes", [[2, 3], [3, 1, 2], [1, 4, 1]])
def test_m_is_asked_anew(changes: list[int]) -> None:
    """A row undoes the division by the M of its own window."""
    life = Life(changes[0])
    for life.wanted in changes:
        life.window()
        assert life.moo.last.target_tokens == (life.wanted, 0)
        # The mean of M gradients of 3 ones, times M.
        assert float(life.moo.last.gram[0, 0, 0]) == 3.0 * life.wanted**2
    assert life.moo.windows == len(changes)


def test_an_m_that_grows_and_shrinks_within_a_window() -> None:
    life = Life(2)
    life.open()
    life.close()
    life.wanted = 3
    life.open()
    life.close()
    assert not life.micro.boundary
    with pytest.raises(BucketMOOError, match="after 2 of 3"):
        life.micro.check_step()
    life.wanted = 2  # its last one has passed
    with pytest.raises(BucketMOOError, match="micro-step 3 of 2 does not end its window"):
        life.open()


def test_ranks_that_differ_in_m_are_told() -> None:
    def body(exchange: Any) -> None:
        life = Life(2, exchange=exchange)
        life.wanted += exchange.rank
        life.open()

    for error in run_ranks(2, body):
        assert isinstance(error, DisagreementError)
        assert "number of micro-steps in a window" in str(error)


@pytest.mark.parametrize("obstructed", [[0], [1], [0, 1]])
def test_an_obstacle_of_one_rank_stops_all(obstructed: list[int]) -> None:
    def body(exchange: Any) -> Any:
        life = Life(1, exchange=exchange)
        stopped = LanguageError("in the way") if exchange.rank in obstructed else None
        with contextlib.suppress(LanguageError):
            life.open(obstacle=stopped)
            return "went on"
        life.micro.abandon()
        life.window()
        return life.state

    assert run_ranks(2, body) == [(False, True, True, 0)] * 2


@dataclasses.dataclass
class Expected:
    """What a run knows, in as few words as possible.

    Args:
        taken, tokens: of the window so far, the open micro-step included.
        windows: how many were resolved.
        is_open, resolved, unused: as in `MicroStep`.
        broken: whether the open micro-step was refused.
    """

    is_open: bool = False
    taken: int = 0
    tokens: int = 0
    windows: int = 0
    resolved: bool = False
    unused: bool = False
    broken: bool = False


class Lives(RuleBasedStateMachine):
    """Any calls in any order that a wrapper, a user or an error can make."""

    @initialize(micro_steps=st.integers(1, 3), once_a_window=st.booleans())
    def begin(self, micro_steps: int, once_a_window: bool) -> None:
        self.life, self.expected = Life(micro_steps, once_a_window), Expected()

    @precondition(lambda self: not self.expected.is_open)
    @rule(tokens=st.integers(1, 4))
    def opens(self, tokens: int) -> None:
        self.life.open("de", tokens)
        expected = self.expected
        expected.is_open, expected.resolved, expected.unused = True, False, False
        expected.taken, expected.tokens = expected.taken + 1, expected.tokens + tokens

    @precondition(lambda self: not self.expected.is_open)
    @rule()
    def is_refused(self) -> None:
        with pytest.raises(LanguageError):
            self.life.open("xx")
        self.expected = dataclasses.replace(
            self.expected, is_open=True, resolved=False, unused=False, broken=True
        )

    @precondition(lambda self: self.expected.is_open and not self.expected.broken)
    @rule()
    def closes(self) -> None:
        expected = self.expected
        self.life.close()
        expected.is_open = False
        if self.life.micro.boundary:
            self.life.micro.resolve()
            assert self.life.moo.last.target_tokens == (expected.tokens, 0)
            self.expected = Expected(windows=expected.windows + 1, resolved=True, unused=True)

    @rule()
    def forward(self) -> None:
        if self.expected.is_open:
            with pytest.raises(BucketMOOError, match="did not come to its end"):
                self.life.micro.check_not_interrupted()
        else:
            self.life.micro.check_not_interrupted()

    @rule()
    def steps(self) -> None:
        if self.expected.is_open or self.expected.taken:
            with pytest.raises(BucketMOOError):
                self.life.micro.check_step()
        else:
            self.life.micro.check_step()
            self.life.micro.use()
            self.expected.unused = False

    @rule()
    def clears(self) -> None:
        self.life.micro.use()
        self.expected.unused = False

    @rule()
    def abandons(self) -> None:
        self.life.micro.abandon()
        self.expected = Expected(windows=self.expected.windows)

    @invariant()
    def is_as_expected(self) -> None:
        if hasattr(self, "expected"):
            expected = self.expected
            assert self.life.state == (expected.is_open, expected.resolved, expected.unused, expected.taken)
            assert self.life.moo.in_window == (expected.taken > 0)
            assert self.life.moo.windows == expected.windows


TestLives = Lives.TestCase
TestLives.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)
