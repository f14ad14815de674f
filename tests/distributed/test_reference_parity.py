"""Gradients, norms and updates of distributed runs equal the float64 reference, for 2, 3 and 4 ranks.

The data, the model and the settings are drawn anew in every run: any two values of two settings meet in one case of the
array at least, on 2 and 3 ranks, and each feature by itself meets one number of ranks, of 2 to 4. The nightly list has
more arrays, on 4 ranks too, and all features on every number of ranks. With `BUCKETMOO_PARITY_JSON` the largest errors
by configuration are written to that file.
"""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import launch
import pytest
from distributed.tolerances import tolerance
from draw import SEED, Case, Key, few, one_world_size, pairwise, parametrized
from outcomes import Outcomes
from packaging.version import Version

from bucketmoo_ds import aggregate

WORLD_SIZES = (2, 3, 4)
STAGES = (0, 1, 2, 3)
NIGHTLY_ARRAYS = 3

MODES = ["auto", "deferred"]

BF16_ON_0 = Version(metadata.version("deepspeed")) >= Version("0.18.6")

# How numbers travel: 16 bits, accumulated in 16 bits (DeepSpeed's default) and in float32. Under autocast gradients,
# and what they are added up in, are float32; the tolerance is as without.
NUMBERS: dict[str, Case] = {
    "fp32": {},
    "bf16": {"dtype": "bf16", "accumulate": None},
    "bf16-fp32": {"dtype": "bf16", "accumulate": "fp32"},
    "fp16": {"dtype": "fp16", "accumulate": None},
    "autocast": {"autocast": True},
}
TARGETS: dict[str, Case] = {"ragged": {}, "even": {"ragged": False}, "none at times": {"empty": True}}
FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": WORLD_SIZES,
    "stage": STAGES,
    "numbers": tuple(NUMBERS),
    "micro_steps": (1, 2, 3),
    "more_languages": (-1, 0, 2),  # than ranks
    "affinity": ("window", "micro_step"),
    "aggregator": ("mgda", "mean", "pcgrad", "cagrad", "upgrad"),
    "granularity": ("bucket", "parameter", "layer", "model"),
    "weighting": ("language", "token"),
    "normalize": ("none", "l2", "loss", "loss_l2"),
    "rescale": ("none", "mean"),
    "preferred": (False, True),
    # The toy model's largest parameter has 403 elements, all of it about 3,100: every parameter alone, several buckets
    # (parameters of several layers in each), one bucket.
    "bucket_size": (1, 700, 1500, 10**9),
    "overlap": (False, True),
    "round_robin": (False, True),
    "clip": (0.0, 0.4, 100.0),
    "groups": (False, True),
    "targets": tuple(TARGETS),
    "frozen": (False, True),
    "tied": (False, True),
    "adapters": (0, 2),
    "small": (False, True),
    "offload": (False, True),
}
NEVER = (
    lambda stage, offload: stage == 0 and offload,
    lambda stage, round_robin: stage in (0, 3) and round_robin,
    # DeepSpeed refuses a float32 accumulation of ZeRO-0, and we fp16, and bf16 before 0.18.6.
    lambda stage, numbers: stage == 0 and numbers not in ("fp32", "bf16")[: 1 + BF16_ON_0],
    lambda stage, numbers: stage == 3 and numbers == "autocast",
    # What a rank adds up in 16 bits is a row that is rounded, and weights that answer to it are only as close as that
    # makes them: MGDA's combined row moves by 2^-8 to 2^-7 of the rows then, on 2 to 4 ranks.
    lambda stage, numbers, micro_steps, aggregator: stage < 2
    and numbers in ("bf16", "bf16-fp32", "fp16")
    and micro_steps > 1
    and aggregator != "mean",
)


# Values of a run's own array, which has fewer than those of the nightly list.
FEWER: Case = {
    "world_size": (2, 3),
    "aggregator": few(FACTORS["aggregator"], 4, "aggregator"),
    "granularity": few(FACTORS["granularity"], 3, "granularity"),
    "normalize": ("none", *few(("l2", "loss", "loss_l2"), 1, "normalize")),
    "bucket_size": few(FACTORS["bucket_size"], 3, "bucket_size"),
}


def array(number: int) -> Iterator[tuple[Key, Case]]:
    factors = FACTORS | ({} if number else FEWER)
    for index, drawn in enumerate(pairwise(factors, NEVER, seed=f"{SEED}/{number}")):
        case = dict(drawn)
        world_size = case.pop("world_size")
        case["languages"] = world_size + case.pop("more_languages")
        case |= NUMBERS[case.pop("numbers")] | TARGETS[case.pop("targets")]
        yield (world_size, f"array{number}-{index}"), case


# Settings of ZeRO-3 that move parameters about, which their gradients must not notice.
FEATURES_OF_3: dict[str, Case] = {
    "offload_params": {"offload": True, "offload_params": True},
    "sub_groups": {"zero": {"sub_group_size": 500}, "groups": True},
    "none_persistent": {"zero": {"stage3_param_persistence_threshold": 0}, "small": True, "granularity": "parameter"},
    "all_persistent": {"zero": {"stage3_param_persistence_threshold": 10**6}},
    "all_reduce": {"zero": {"reduce_scatter": False}},
    "hpz": {"zero": {"zero_hpz_partition_size": 2}, "small": True},
}
# Two nodes of two ranks, each with one language in a micro-step.
NODES: Case = {
    "micro_steps": 2,
    "languages": 3,
    "affinity": "micro_step",
    "by_node": True,
    "moo": {"ranks_per_node": 2, "exchange": "two_stage"},
}


def features() -> Iterator[tuple[Key, Case]]:
    """Settings that no array has, by themselves."""
    for index, (name, extra) in enumerate(FEATURES_OF_3.items()):
        for world_size in (2, 3 + index % 2):
            yield (world_size, f"zero3-{name}"), {"stage": 3, "micro_steps": 1 + index % 2, "languages": 2} | extra
    # Where noise leaves a Gram nearly singular, weights would answer to rounding.
    cross: Case = {"languages": 2, "alike": True, "moo": {"gram": "cross"}}
    for stage in (1, 2):
        yield (2, f"zero{stage}-cross"), {"stage": stage, "micro_steps": 3, "affinity": "micro_step"} | cross
    for stage in STAGES:
        yield (4, f"zero{stage}-nodes"), {"stage": stage} | NODES


ARRAYS = [dict(array(number)) for number in range(1 + NIGHTLY_ARRAYS)]
FEATURES = dict(features())
CASES: dict[Key, Case] = {
    key: case | {"seed": SEED + index}
    for index, (key, case) in enumerate(itertools.chain(*(each.items() for each in (*ARRAYS, FEATURES))))
}
DRAWN = [*ARRAYS[0], *one_world_size(FEATURES)]


def exchanges(case: Case) -> int:
    """Exchanges a window: ZeRO-0 and 1 have one where ranks keep their languages, and else are not asked."""
    return 1 if case["stage"] < 2 and case.get("affinity") != "micro_step" else int(case["micro_steps"])


def streams(case: Case) -> bool:
    """Whether it has to."""
    rule = aggregate.create(case.get("aggregator", "mgda"))
    return exchanges(case) == 1 and case.get("granularity", "bucket") == "bucket" and rule.streams_up_to >= 16


def runs_twice(key: Key) -> bool:
    """With 2 ranks every case of ZeRO-1 and 2; else those that stream, whose second run takes another path. (ZeRO-3
    takes three times as long.) Not of 16-bit rows that stream: their Gram is added up in another order than that of
    float32 rows, which are those of a window, and a weight's last bit may move one of the result."""
    case = CASES[key]
    if streams(case):
        return "dtype" not in case
    return key[0] == 2 and case["stage"] < 3


every_case = parametrized(CASES, DRAWN)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    runs = {key: case | {"modes": MODES[: 1 + runs_twice(key)]} for key, case in CASES.items()}
    found = Outcomes(request, "compare_with_reference.py", runs)
    yield found
    found.write("BUCKETMOO_PARITY_JSON", summary)


@every_case
def test_combined_gradient_is_the_reference(key: Key, outcomes: Outcomes) -> None:
    for result in outcomes[key]:
        assert "error" not in result, f"{result}, {outcomes.explain(key)}"
        assert result["gradient"] <= tolerance(CASES[key]), f"{result}, {outcomes.explain(key)}"


@every_case
def test_norm_and_update_are_the_reference(key: Key, outcomes: Outcomes) -> None:
    # The norm is summed in float32 over about 3,000 squares, in partial sums: 1e-6. The update of a float32 parameter
    # is rounded to float32 relative to the parameter, and to the step by which the gradient's error moves it.
    limit = max(tolerance(CASES[key]), 1e-6)
    for result in outcomes[key]:
        assert result["norm"] <= limit, f"{result}, {outcomes.explain(key)}"
        assert result["update"] <= limit, f"{result}, {outcomes.explain(key)}"


@every_case
def test_ranks_hold_the_same_bits(key: Key, outcomes: Outcomes) -> None:
    assert len({result["parameters"][0] for result in outcomes[key]}) == 1, outcomes.explain(key)


@parametrized([key for key in CASES if runs_twice(key)], DRAWN)
def test_second_run_and_other_mode_give_the_same_bits(key: Key, outcomes: Outcomes) -> None:
    """The second run is deferred: it repeats a first one that was deferred too, and else compares the two modes."""
    case = CASES[key]
    for result in outcomes[key]:
        automatic, deferred = result["streaming"]
        assert not deferred
        if exchanges(case) > 1 and case["stage"] > 1:
            assert not automatic, "rows of several micro-steps cannot be resolved while streaming"
        elif streams(case):
            assert automatic, "this test would not compare the two modes"
        assert result["parameters"][0] == result["parameters"][1], outcomes.explain(key)


def summary(outcomes: Outcomes) -> dict[str, Any]:
    """The largest errors by world size, stage and dtypes, with what they were measured on."""
    worst: dict[str, dict[str, float]] = {}
    for key, results in outcomes.items():
        case = CASES[key]
        dtype = case.get("dtype", "fp32")
        label = f"W={key[0]} ZeRO-{case['stage']} {dtype}"
        if dtype != "fp32":
            label += f" accumulated in {case['accumulate'] or dtype}, {case['micro_steps']} micro-steps"
        entry = worst.setdefault(label, {"tolerance": 0.0, "cases": 0})
        entry["cases"] += 1
        entry["tolerance"] = max(entry["tolerance"], tolerance(case))
        for error in ("gradient", "relative", "weights", "norm", "update"):
            entry[error] = max([entry.get(error, 0.0), *(result[error] for result in results)])
    return {
        "what": "largest error of distributed runs against bucketmoo_ds.reference (float64), by configuration: "
        "gradient (asserted; relative to the sum of the norms of the weighted rows), relative (to the combined norm), "
        "weights (absolute), norm (relative), update (relative to the parameter)",
        "seed": SEED,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": _git("status", "--porcelain", "../bucketmoo_ds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, gloo",
        "versions": {
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "deepspeed": metadata.version("deepspeed"),
        },
        "errors": dict(sorted(worst.items())),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=launch.TESTS)
    return done.stdout.strip()
