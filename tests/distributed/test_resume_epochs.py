"""A Trainer that is resumed, in any epoch, is fed the rows of the run that was not stopped."""

from __future__ import annotations

from typing import Any

import launch
import pytest

MICRO_STEPS, EPOCHS = 2, 3  # as in the worker
# 48 rows in micro-batches of 2 make 6 windows an epoch on two ranks, 12 on one; more with rounds.
CASES: dict[int, list[dict[str, Any]]] = {
    1: [{"steps": [15, 31]}],
    2: [
        {"steps": [2, 8, 14]},
        {"steps": [6], "dispatch": True},
        {"steps": [8], "ignore_data_skip": True},
        {"steps": [10], "repeat": "auto"},
        {"steps": [8], "dispatch": True},
    ],
}
REFUSED = (2, 4)
WHICH = [(ranks, index) for ranks, cases in CASES.items() for index in range(len(cases)) if (ranks, index) != REFUSED]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[list[Any]]]:
    return {ranks: launch.run("resume_epochs.py", ranks, cases) for ranks, cases in CASES.items()}


@pytest.mark.parametrize(("ranks", "index"), WHICH)
def test_resumes_with_the_rows_of_the_uninterrupted_run(
    outcomes: dict[int, list[list[Any]]], ranks: int, index: int
) -> None:
    case = CASES[ranks][index]
    for found in outcomes[ranks][index]:
        assert "error" not in found, found
        windows, fed = found["windows"], found["fed"]
        assert len(fed) == EPOCHS * windows * MICRO_STEPS
        for step, resumed in found["resumed"].items():
            if case.get("ignore_data_skip"):  # Trainer begins the epoch anew, and stops with the last step
                begin = step // windows * windows
                expected = fed[begin * MICRO_STEPS :][: len(fed) - step * MICRO_STEPS]
            else:
                expected = fed[step * MICRO_STEPS :]
            assert resumed == expected, f"resumed after step {step}"


def test_a_skip_that_would_be_too_short_is_refused(outcomes: dict[int, list[list[Any]]]) -> None:
    """With dispatch_batches, Accelerate 1.15 skips batches of the global order."""
    ranks, index = REFUSED
    for found in outcomes[ranks][index]:
        assert found["error"] == "ConfigError"
        assert "resume with dispatch_batches=False" in found["message"]


def test_dispatching_feeds_the_same_rows(outcomes: dict[int, list[list[Any]]]) -> None:
    for with_dispatch, without in zip(outcomes[2][1], outcomes[2][0], strict=True):
        assert with_dispatch["fed"] == without["fed"]


def test_ranks_and_epochs_are_fed_other_rows(outcomes: dict[int, list[list[Any]]]) -> None:
    """Else the comparison above would say nothing."""
    first, second = (found["fed"] for found in outcomes[2][0])
    epoch = len(first) // EPOCHS
    rows = {row for batch in first[:epoch] for row in batch}
    assert not rows & {row for batch in second[:epoch] for row in batch}
    assert first[:epoch] != first[epoch : 2 * epoch]
    assert outcomes[2][0][0]["windows"] == 6 < outcomes[2][3][0]["windows"]
