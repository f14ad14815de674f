"""All stages of ZeRO reach the same weights: blocks are of the model, not of how a stage cuts it up."""

from __future__ import annotations

import itertools
import random
from typing import Any

import launch
import pytest
from draw import SEED

WORLD_SIZES = (2, 3)
DRAWN = random.Random(SEED).choice(WORLD_SIZES)  # the nightly list has the other
STEPS, LEARNING_RATE = 10, 0.05
# Every stage has buckets of its own size, in elements, which static blocks must not depend on.
BUCKET_SIZES = {0: 10**9, 1: 700, 2: 1500, 3: 1}
GRANULARITIES = ("parameter", "layer", "model")
CASES: list[dict[str, Any]] = [
    {"stage": stage, "granularity": granularity, "bucket_size": size, "aggregator": "mgda"}
    | {"gram_every": 3 if granularity == "layer" else 1}
    for granularity, (stage, size) in itertools.product(GRANULARITIES, BUCKET_SIZES.items())
]
MEAN = {"stage": 1, "granularity": "model", "bucket_size": 700, "aggregator": "mean", "gram_every": 1}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, id=f"W{each}", marks=() if each == DRAWN else pytest.mark.nightly) for each in WORLD_SIZES
    ],
)
def outcomes(request: pytest.FixtureRequest) -> list[list[Any]]:
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    cases = [case | {"seed": SEED} for case in (*CASES, MEAN)]
    found = launch.run("train_stages.py", request.param, cases, timeout=300)
    for case, results in zip(cases, found, strict=True):
        assert "error" not in results[0], f"{results}, {case}"
    return found


def result(outcomes: list[list[Any]], granularity: str, stage: int) -> Any:
    return next(
        results[0]
        for case, results in zip(CASES, outcomes, strict=False)
        if (case["granularity"], case["stage"]) == (granularity, stage)
    )


def difference(found: Any, wanted: Any) -> float:
    return float((found["weights"] - wanted["weights"]).norm() / wanted["weights"].norm())


def tolerance(wanted: Any) -> float:
    """In each of the steps, both runs round the weights to float32 (6e-8) and take a combined gradient with an error of
    5e-7, relative to its weighted rows (see test_reference_parity.py), times the learning rate. Steps this small do not
    magnify a difference: the learning rate times the curvature of this model is below 1."""
    rows = wanted["rows"] / float(wanted["weights"].norm())
    return 2 * STEPS * (6e-8 + LEARNING_RATE * 5e-7 * rows)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stage", [stage for stage in BUCKET_SIZES if stage != 1])
def test_stages_reach_the_same_weights(outcomes: list[list[Any]], granularity: str, stage: int) -> None:
    found, wanted = (result(outcomes, granularity, each) for each in (stage, 1))
    assert found["buckets"] != wanted["buckets"]
    assert difference(found, wanted) < tolerance(wanted), f"BUCKETMOO_TEST_SEED={SEED}"


def test_ranks_hold_the_same_weights(outcomes: list[list[Any]]) -> None:
    for results in outcomes:
        for other in results[1:]:
            assert other["weights"].equal(results[0]["weights"])


def test_these_runs_differ(outcomes: list[list[Any]]) -> None:
    """The comparison above would see a difference: other blocks, and averaging, give other weights."""
    runs = [result(outcomes, granularity, 1) for granularity in GRANULARITIES] + [outcomes[-1][0]]
    for one, other in itertools.combinations(runs, 2):
        assert difference(one, other) > 100 * tolerance(one)
