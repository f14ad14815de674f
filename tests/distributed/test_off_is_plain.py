"""Without the section, or with `"enabled": false`, DeepSpeed trains bit for bit as if the package were not there; with
the aggregator `mean` it trains alike to rounding."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import launch
import pytest

WORLD_SIZE = 2
PLAIN: list[dict[str, Any]] = [
    {"package": False, "stage": stage, "dtype": dtype, "micro_steps": micro_steps, "optimizer": "adam", "moo": None}
    for stage, dtype, micro_steps in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (1, 2))
]
OFF: list[dict[str, Any] | None] = [None, {"enabled": False}]

# With equal token counts every language's mean has the same share if all have as many micro-batches in the window: 2
# languages on 2 ranks, or 1. On ZeRO-1 a rank keeps its language.
MEAN = [
    {"stage": stage, "dtype": "fp32", "micro_steps": micro_steps, "optimizer": "sgd", **more}
    for stage, micro_steps in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2))
    for more in (
        {"languages": 2, "moo": {"aggregator": "mean"}},
        {"languages": 1, "moo": {"aggregator": "mean", "languages": ["de"]}},
        {"languages": 1, "moo": {"aggregator": "mgda", "languages": ["de"], "granularity": "layer"}},
        {"languages": 3, "moo": {"aggregator": "mean", "weighting": "token"}},
        {"languages": 3, "moo": {"aggregator": "mean", "weighting": "token"}, "ragged": True, "by_tokens": True},
    )
]

ORDERS = (
    "import bucketmoo_ds, deepspeed",
    "import deepspeed, bucketmoo_ds",
    "from deepspeed import initialize; import bucketmoo_ds",
)
IS_INSTALLED = """
from deepspeed.runtime.engine import DeepSpeedEngine
assert hasattr(DeepSpeedEngine.__init__, "_bucket_moo_wrapper")
"""


@pytest.fixture(scope="module")
def plain() -> list[list[Any]]:
    """Runs of processes that never import our package."""
    return launch.run("train_plain.py", WORLD_SIZE, [*PLAIN, *(_without_moo(case) for case in MEAN)])


@pytest.fixture(scope="module")
def with_package() -> list[list[Any]]:
    # An engine on ZeRO-3 leaves torch's linear layers replaced, which rounds bf16 otherwise: so it comes last.
    off = [case | {"package": True, "moo": moo} for case in PLAIN for moo in OFF]
    # `by_tokens` scales plain DeepSpeed's losses; ours count the tokens themselves.
    on = [case | {"package": True, "by_tokens": False} for case in MEAN]
    return launch.run("train_plain.py", WORLD_SIZE, [*off, *on])


def _without_moo(case: dict[str, Any]) -> dict[str, Any]:
    return case | {"package": False, "moo": None}


@pytest.mark.parametrize("moo", range(len(OFF)), ids=["no section", "enabled false"])
@pytest.mark.parametrize("index", range(len(PLAIN)), ids=lambda index: str(list(PLAIN[index].values())[1:4]))
def test_off_equals_plain_deepspeed_bit_for_bit(
    plain: list[list[Any]], with_package: list[list[Any]], index: int, moo: int
) -> None:
    for expected, found in zip(plain[index], with_package[len(OFF) * index + moo], strict=True):
        assert "error" not in expected, expected
        assert not expected["imported"]
        assert found["imported"]
        assert found["type"] == expected["type"] == "DeepSpeedEngine"
        assert found["bits"] == expected["bits"]


def test_these_runs_differ(plain: list[list[Any]]) -> None:
    """The comparison above would see a difference: other settings give other bits."""
    bits = [results[0]["bits"] for results in plain[: len(PLAIN)]]
    for stage in (2, 3):
        of_stage = [bits[index] for index, case in enumerate(PLAIN) if case["stage"] == stage]
        assert len(set(of_stage)) == len(of_stage)


@pytest.mark.parametrize("index", range(len(MEAN)), ids=lambda index: str(list(MEAN[index].values())))
def test_mean_equals_plain_averaging(plain: list[list[Any]], with_package: list[list[Any]], index: int) -> None:
    for expected, found in zip(plain[len(PLAIN) + index], with_package[len(OFF) * len(PLAIN) + index], strict=True):
        assert "error" not in found, found
        assert found["type"] == ("BucketMOOEngine" if MEAN[index]["stage"] else "ReplicatedEngine")
        error = float((found["parameters"] - expected["parameters"]).norm() / expected["parameters"].norm())
        # float32 on both sides, summed in another order: 6e-8 a rounding of each of 4 updates.
        assert error < 5e-7


def test_installs_in_every_order_of_imports() -> None:
    """Each order in a process of its own, at the same time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", order + IS_INSTALLED], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for order in ORDERS
    ]
    for order, process in zip(ORDERS, processes, strict=True):
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, f"{order}: {errors.decode()[-2000:]}"
