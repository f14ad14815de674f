"""Accelerate and transformers' Trainer, whose code knows nothing of us, train as `bucketmoo_ds.initialize` does."""

from __future__ import annotations

import itertools
import random
from typing import Any

import launch
import pytest
from distributed.of_transformers import counted_otherwise_by_4, refused_by_4
from draw import SEED

from bucketmoo_ds.config import BucketMOOConfig

WORLD_SIZE = 2
WINDOWS = 3
# float32 on both sides, whose gradients differ by a few roundings of 6e-8 (a loss is divided before it is summed or
# after); one of the three SGD steps moves the parameters by less than a tenth of their norm.
TOLERANCE = 1e-7

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)]  # (stage, micro-steps)
MEAN_LAYOUTS = [(1, 1), (2, 1), (2, 2)]
SMOOTH_LAYOUTS = [(1, 2), (3, 2)]
SMOOTHING = 0.1
# Written out, so that "auto" stands there three times, which Accelerate would resolve.
MOO: dict[str, Any] = BucketMOOConfig(
    languages=("de", "fr", "pl"), aggregator="mgda", granularity="layer"
).to_json()
BY_TOKENS: dict[str, Any] = {"aggregator": "mean", "weighting": "token"}


def case(
    way: str, layout: tuple[int, int], moo: dict[str, Any] | None, ragged: bool, smoothing: float = 0.0
) -> dict[str, Any]:
    found = {"way": way, "stage": layout[0], "micro_steps": layout[1], "moo": moo, "ragged": ragged}
    return found | ({"smoothing": smoothing} if smoothing else {})


ALWAYS = [
    *(case(way, layout, MOO, True) for way in ("initialize", "accelerate", "trainer") for layout in LAYOUTS),
    *(case(way, layout, MOO, True, SMOOTHING) for way in ("initialize", "trainer") for layout in SMOOTH_LAYOUTS),
]
# Of `mean` every layout has ragged batches or equal counts, drawn anew in every run; both in the nightly list.
MEAN = list(itertools.product(MEAN_LAYOUTS, (True, False)))
DRAWN = [(layout, random.Random(f"{SEED}/{layout}").random() < 0.5) for layout in MEAN_LAYOUTS]
CONFLICTS = ((2, 2), True)  # whose plain run is compared with MGDA's, too

Outcomes = list[tuple[dict[str, Any], list[Any]]]  # cases, with the results of all ranks


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    mine = [item for item in request.session.items if item.path == request.path]
    tests = [item.callspec.params for item in mine if hasattr(item, "callspec")]
    asked = [each for each in MEAN if any(each == (test.get("layout"), test.get("ragged")) for test in tests)]
    cases = [*ALWAYS, *(case("trainer", layout, BY_TOKENS, ragged) for layout, ragged in asked)]
    cases += [case("trainer", layout, None, ragged) for layout, ragged in dict.fromkeys([*asked, CONFLICTS])]
    return list(zip(cases, launch.run("through_hugging_face.py", WORLD_SIZE, cases), strict=True))


def results(outcomes: Outcomes, *arguments: Any) -> list[Any]:
    wanted = case(*arguments)
    found = next(results for case, results in outcomes if case == wanted)
    for result in found:
        assert "error" not in result, result
    return found


def difference(found: Any, expected: Any) -> float:
    return float((found["parameters"] - expected["parameters"]).norm() / expected["parameters"].norm())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"zero{layout[0]}-M{layout[1]}")
@pytest.mark.parametrize("way", ["accelerate", "trainer"])
def test_trains_as_initialize_does(outcomes: Outcomes, way: str, layout: tuple[int, int]) -> None:
    """Trainer's loss is a sum over tokens divided by the window's, times W: the rows must be the same means."""
    expected = results(outcomes, "initialize", layout, MOO, True)
    for found, wanted in zip(results(outcomes, way, layout, MOO, True), expected, strict=True):
        assert found["windows"] == wanted["windows"] == WINDOWS
        assert found["target_tokens"] == wanted["target_tokens"]
        assert len({tokens for tokens in found["target_tokens"] if tokens}) > 1, "the counts should differ"
        assert difference(found, wanted) < TOLERANCE


@refused_by_4
@pytest.mark.parametrize("layout", SMOOTH_LAYOUTS, ids=lambda layout: f"zero{layout[0]}-M{layout[1]}")
def test_label_smoothing_trains_as_initialize_does(outcomes: Outcomes, layout: tuple[int, int]) -> None:
    """Trainer takes the labels off the batch, and its smoother divides by the window's tokens, outside of the model."""
    expected = results(outcomes, "initialize", layout, MOO, True, SMOOTHING)
    plain = results(outcomes, "initialize", layout, MOO, True)
    for found, wanted, other in zip(
        results(outcomes, "trainer", layout, MOO, True, SMOOTHING), expected, plain, strict=True
    ):
        assert found["target_tokens"] == wanted["target_tokens"]
        assert difference(found, wanted) < TOLERANCE
        assert difference(found, other) > 100 * TOLERANCE, "smoothing should matter"


@counted_otherwise_by_4
@pytest.mark.parametrize(
    ("layout", "ragged"),
    [
        pytest.param(
            layout,
            ragged,
            id=f"zero{layout[0]}-M{layout[1]}-{'ragged' if ragged else 'equal counts'}",
            marks=() if (layout, ragged) in DRAWN else pytest.mark.nightly,
        )
        for layout, ragged in MEAN
    ],
)
def test_mean_by_tokens_equals_plain_trainer(outcomes: Outcomes, ragged: bool, layout: tuple[int, int]) -> None:
    """Plain Trainer averages over the tokens of the window, whatever their languages."""
    expected = results(outcomes, "trainer", layout, None, ragged)
    for found, wanted in zip(results(outcomes, "trainer", layout, BY_TOKENS, ragged), expected, strict=True):
        assert wanted["type"] == "DeepSpeedEngine"
        assert found["windows"] == WINDOWS
        assert difference(found, wanted) < TOLERANCE


def test_conflicts_were_resolved(outcomes: Outcomes) -> None:
    """MGDA trains otherwise than averaging does: the comparisons above are of different runs."""
    first, _ = results(outcomes, "trainer", (2, 2), MOO, True)
    plain, _ = results(outcomes, "trainer", (2, 2), None, True)
    assert difference(first, plain) > 100 * TOLERANCE
    assert first["weights"].std(dim=0).max() > 1e-3
