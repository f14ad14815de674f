"""Without the section, or with `"enabled": false`, DeepSpeed trains bit for bit as if the package were not there; with
the aggregator `mean` it trains alike to rounding.

Every run takes each plain run with one way to be off, and each layout with two ways to average, drawn anew so that each
way meets layouts; the nightly list has all.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from draw import SEED, Case, Key, parametrized
from outcomes import Outcomes

WORLD_SIZE = 2
PLAIN: dict[Key, Case] = {
    (WORLD_SIZE, f"zero{stage}-{dtype}-M{micro_steps}"): {
        "package": False,
        "stage": stage,
        "dtype": dtype,
        "micro_steps": micro_steps,
        "optimizer": "adam",
        "moo": None,
    }
    for stage, dtype, micro_steps in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (1, 2))
}
WAYS_OFF: dict[str, Case | None] = {"no section": None, "enabled false": {"enabled": False}}
# An engine on ZeRO-3 leaves torch's linear layers replaced, which rounds bf16 otherwise: so it comes last.
OFF: dict[Key, Case] = {
    (WORLD_SIZE, f"{name}, {way}"): case | {"package": True, "moo": moo}
    for (_, name), case in PLAIN.items()
    for way, moo in WAYS_OFF.items()
}

# With equal token counts every language's mean has the same share if all have as many micro-batches in the window: 2
# languages on 2 ranks, or 1. On ZeRO-1 a rank keeps its language.
LAYOUTS = ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2))
WAYS: dict[str, Case] = {
    "two languages": {"languages": 2, "moo": {"aggregator": "mean"}},
    "one": {"languages": 1, "moo": {"aggregator": "mean", "languages": ["de"]}},
    "one, mgda": {"languages": 1, "moo": {"aggregator": "mgda", "languages": ["de"], "granularity": "layer"}},
    "by tokens": {"languages": 3, "moo": {"aggregator": "mean", "weighting": "token"}},
    "by tokens, ragged": {
        "languages": 3,
        "moo": {"aggregator": "mean", "weighting": "token"},
        "ragged": True,
        "by_tokens": True,
    },
}
MEAN: dict[Key, Case] = {
    (WORLD_SIZE, f"mean of zero{stage}-M{micro_steps}, {way}"): {
        "package": True,
        "stage": stage,
        "dtype": "fp32",
        "micro_steps": micro_steps,
        "optimizer": "sgd",
        **more,
    }
    for stage, micro_steps in LAYOUTS
    for way, more in WAYS.items()
}


def drawn() -> list[Key]:
    draw = random.Random(SEED)
    off, mean, first = list(OFF), list(MEAN), draw.randrange(len(WAYS))
    found = [off[len(WAYS_OFF) * number + draw.randrange(len(WAYS_OFF))] for number in range(len(PLAIN))]
    for number in range(2 * len(LAYOUTS)):
        found.append(mean[len(WAYS) * (number // 2) + (first + number) % len(WAYS)])
    return found


DRAWN = drawn()


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> Outcomes:
    """Runs of processes that never import our package."""
    cases = PLAIN | {key: case | {"package": False, "moo": None} for key, case in MEAN.items()}
    return Outcomes(request, "train_plain.py", cases, also=PLAIN)


@pytest.fixture(scope="module")
def with_package(request: pytest.FixtureRequest) -> Outcomes:
    # `by_tokens` scales plain DeepSpeed's losses; ours count the tokens themselves.
    return Outcomes(request, "train_plain.py", OFF | {key: case | {"by_tokens": False} for key, case in MEAN.items()})


@parametrized(OFF, DRAWN)
def test_off_equals_plain_deepspeed_bit_for_bit(key: Key, plain: Outcomes, with_package: Outcomes) -> None:
    name, _ = key[1].split(", ")
    for expected, found in zip(plain[WORLD_SIZE, name], with_package[key], strict=True):
        assert "error" not in expected, expected
        assert not expected["imported"]
        assert found["imported"]
        assert found["type"] == expected["type"] == "DeepSpeedEngine"
        assert found["bits"] == expected["bits"]


def test_these_runs_differ(plain: Outcomes) -> None:
    """The comparison above would see a difference: other settings give other bits."""
    for stage in (2, 3):
        bits: list[Any] = [plain[key][0]["bits"] for key, case in PLAIN.items() if case["stage"] == stage]
        assert len(set(bits)) == len(bits)


@parametrized(MEAN, DRAWN)
def test_mean_equals_plain_averaging(key: Key, plain: Outcomes, with_package: Outcomes) -> None:
    for expected, found in zip(plain[key], with_package[key], strict=True):
        assert "error" not in found, found
        assert found["type"] == ("BucketMOOEngine" if MEAN[key]["stage"] else "ReplicatedEngine")
        error = float((found["parameters"] - expected["parameters"]).norm() / expected["parameters"].norm())
        # float32 on both sides, summed in another order: 6e-8 a rounding of each of 4 updates.
        assert error < 5e-7
