"""Accelerate and transformers' Trainer, whose code knows nothing of us, train as `bucketmoo_ds.initialize` does."""

from __future__ import annotations

import itertools
from typing import Any

import launch
import pytest

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


CASES = [
    *(case(way, layout, MOO, True) for way in ("initialize", "accelerate", "trainer") for layout in LAYOUTS),
    *(
        case("trainer", layout, moo, ragged)
        for moo, layout, ragged in itertools.product((None, BY_TOKENS), MEAN_LAYOUTS, (True, False))
    ),
    *(case(way, layout, MOO, True, SMOOTHING) for way in ("initialize", "trainer") for layout in SMOOTH_LAYOUTS),
]


@pytest.fixture(scope="module")
def outcomes() -> list[list[Any]]:
    return launch.run("through_hugging_face.py", WORLD_SIZE, CASES)


def results(outcomes: list[list[Any]], *arguments: Any) -> list[Any]:
    found = outcomes[CASES.index(case(*arguments))]
    for result in found:
        assert "error" not in result, result
    return found


def difference(found: Any, expected: Any) -> float:
    return float((found["parameters"] - expected["parameters"]).norm() / expected["parameters"].norm())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"zero{layout[0]}-M{layout[1]}")
@pytest.mark.parametrize("way", ["accelerate", "trainer"])
def test_trains_as_initialize_does(outcomes: list[list[Any]], way: str, layout: tuple[int, int]) -> None:
    """Trainer's loss is a sum over tokens divided by the window's, times W: the rows must be the same means."""
    expected = results(outcomes, "initialize", layout, MOO, True)
    for found, wanted in zip(results(outcomes, way, layout, MOO, True), expected, strict=True):
        assert found["windows"] == wanted["windows"] == WINDOWS
        assert found["target_tokens"] == wanted["target_tokens"]
        assert len({tokens for tokens in found["target_tokens"] if tokens}) > 1, "the counts should differ"
        assert difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("layout", SMOOTH_LAYOUTS, ids=lambda layout: f"zero{layout[0]}-M{layout[1]}")
def test_label_smoothing_trains_as_initialize_does(outcomes: list[list[Any]], layout: tuple[int, int]) -> None:
    """Trainer takes the labels off the batch, and its smoother divides by the window's tokens, outside of the model."""
    expected = results(outcomes, "initialize", layout, MOO, True, SMOOTHING)
    plain = results(outcomes, "initialize", layout, MOO, True)
    for found, wanted, other in zip(
        results(outcomes, "trainer", layout, MOO, True, SMOOTHING), expected, plain, strict=True
    ):
        assert found["target_tokens"] == wanted["target_tokens"]
        assert difference(found, wanted) < TOLERANCE
        assert difference(found, other) > 100 * TOLERANCE, "smoothing should matter"


@pytest.mark.parametrize("layout", MEAN_LAYOUTS, ids=lambda layout: f"zero{layout[0]}-M{layout[1]}")
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "equal counts"])
def test_mean_by_tokens_equals_plain_trainer(outcomes: list[list[Any]], ragged: bool, layout: tuple[int, int]) -> None:
    """Plain Trainer averages over the tokens of the window, whatever their languages."""
    expected = results(outcomes, "trainer", layout, None, ragged)
    for found, wanted in zip(results(outcomes, "trainer", layout, BY_TOKENS, ragged), expected, strict=True):
        assert wanted["type"] == "DeepSpeedEngine"
        assert found["windows"] == WINDOWS
        assert difference(found, wanted) < TOLERANCE


def test_conflicts_were_resolved(outcomes: list[list[Any]]) -> None:
    """MGDA trains otherwise than averaging does: the comparisons above are of different runs."""
    first, _ = results(outcomes, "trainer", (2, 2), MOO, True)
    plain, _ = results(outcomes, "trainer", (2, 2), None, True)
    assert difference(first, plain) > 100 * TOLERANCE
    assert first["weights"].std(dim=0).max() > 1e-3
