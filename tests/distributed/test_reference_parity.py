"""Gradients, norms and updates of distributed runs equal the float64 reference, for 2, 3 and 4 ranks.

All cases of a world size run in one start of its processes. The data, the model and half of the settings are drawn
anew in every run, from a seed that every failure names and that the environment variable `BUCKETMOO_TEST_SEED` sets.
With `BUCKETMOO_PARITY_JSON` the largest errors by configuration are written to that file.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import launch
import pytest
from distributed.tolerances import tolerance

SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
WORLD_SIZES = (2, 3, 4)
STAGES = (0, 1, 2, 3)
AGGREGATORS = ("mgda", "mean", "pcgrad", "cagrad", "upgrad")
GRANULARITIES = ("bucket", "parameter", "layer", "model")
# The toy model's largest parameter has 403 elements, all of it about 3,100: every parameter alone, several buckets
# (parameters of several layers in each), one bucket.
BUCKET_SIZES = (1, 700, 1500, 10**9)

MODES = ["auto", "deferred"]

Case = dict[str, Any]
Key = tuple[int, str]


def grid(world_size: int) -> Iterator[tuple[str, Case]]:
    """All stages, windows of 1 to 3 micro-steps, and fewer, as many and more languages than ranks: every combination
    with some number of ranks (with 2 of them two thirds, with 3 and 4 another third each). The other settings go round,
    so that each value of each meets several stages and windows."""
    thirds = {2: (0, 1), 3: (0,), 4: (2,)}[world_size]
    languages = (max(world_size - 1, 1), world_size, world_size + 2)
    combinations = itertools.product(enumerate(STAGES), (1, 2, 3), enumerate(languages))
    for index, ((row, stage), micro_steps, (column, count)) in enumerate(combinations):
        if (row + micro_steps + column) % 3 not in thirds:
            continue
        yield f"zero{stage}-M{micro_steps}-K{count}", {
            "stage": stage,
            "micro_steps": micro_steps,
            "languages": count,
            "aggregator": AGGREGATORS[index % len(AGGREGATORS)],
            "granularity": GRANULARITIES[(index + index // 4) % len(GRANULARITIES)],
            "weighting": ("language", "token")[index // 2 % 2],
            "overlap": index % 2 == 0,
            "affinity": ("window", "micro_step")[index % 2] if stage == 1 else "",
        }


FEATURES: dict[str, Case] = {
    "plain": {"ragged": False},
    "groups": {"groups": True, "round_robin": True, "clip": 0.7},
    "clip": {"clip": 0.5, "overlap": True, "micro_steps": 2},
    "one_bucket": {"bucket_size": BUCKET_SIZES[-1]},
    "tiny_buckets": {"bucket_size": BUCKET_SIZES[0], "overlap": True, "granularity": "layer"},
    "frozen": {"frozen": True, "granularity": "parameter"},
    "unused": {"adapters": 2, "granularity": "parameter"},
    "tied": {"tied": True},
    "no_target": {"empty": True, "micro_steps": 2},
    "no_target-languages_apart": {"empty": True, "micro_steps": 3, "affinity": "micro_step"},
    "normalize": {"normalize": "unit", "rescale": "mean", "aggregator": "upgrad"},
    "small": {"small": True, "groups": True},
    "offload": {"offload": True, "groups": True, "clip": 0.3, "stages": (1, 2, 3)},
    # Gradients, and what they are added up in, are float32; the tolerance is as without autocast.
    "autocast": {"autocast": True, "micro_steps": 2, "stages": (1, 2)},
    "round_robin": {"round_robin": True, "stages": (1, 2)},
}
# Settings of ZeRO-3 that move parameters about, which their gradients must not notice.
FEATURES_OF_3: dict[str, Case] = {
    "offload_params": {"offload": True, "offload_params": True},
    "sub_groups": {"zero": {"sub_group_size": 500}, "groups": True},
    "none_persistent": {"zero": {"stage3_param_persistence_threshold": 0}, "small": True, "granularity": "parameter"},
    "all_persistent": {"zero": {"stage3_param_persistence_threshold": 10**6}},
    "all_reduce": {"zero": {"reduce_scatter": False}},
    "hpz": {"zero": {"zero_hpz_partition_size": 2}, "small": True},
}


def features(world_size: int) -> Iterator[tuple[str, Case]]:
    """Every setting that changes the path of a gradient, by itself, on each stage that it is for: one with 2 ranks,
    another with 3, another with 4. ZeRO-3's own meet 2 ranks, and 3 or 4."""
    for index, (name, feature) in enumerate(FEATURES.items()):
        extra = dict(feature)
        stages = extra.pop("stages", STAGES)
        stage = stages[(index + world_size) % len(stages)]
        # On ZeRO-1, several languages in one window need as many ranks; a window of one micro-step streams.
        micro_steps = 1 if stage == 1 else 2
        yield f"zero{stage}-{name}", {"stage": stage, "micro_steps": micro_steps, "languages": world_size} | extra
    for index, (name, extra) in enumerate(FEATURES_OF_3.items()):
        if world_size in (2, 3 + index % 2):
            yield f"zero3-{name}", {"stage": 3, "micro_steps": 1 + index % 2, "languages": world_size} | extra


def nodes(world_size: int) -> Iterator[tuple[str, Case]]:
    """Two nodes of two ranks, each with one language in a micro-step."""
    two_stages = {"ranks_per_node": 2, "exchange": "two_stage"}
    for stage in STAGES if world_size == 4 else ():
        yield f"zero{stage}-nodes", {
            "stage": stage,
            "micro_steps": 2,
            "languages": 3,
            "affinity": "micro_step",
            "by_node": True,
            "moo": two_stages,
        }


def half_precision(world_size: int) -> Iterator[tuple[str, Case]]:
    """16 bits, accumulated in 16 bits (DeepSpeed's default) and in float32, the latter also with offload. What is a
    window of one micro-step with an even number of ranks is one of three with 3 ranks, and the other way round."""
    ways: tuple[tuple[str, str | None, bool], ...] = (
        ("bf16", None, False),
        ("bf16", "fp32", False),
        ("bf16", "fp32", True),
        ("fp16", None, False),
    )
    for index, (stage, (dtype, accumulate, offload)) in enumerate(itertools.product(STAGES, ways)):
        if stage == 0 and (dtype, accumulate) != ("bf16", None):  # DeepSpeed refuses float32, and we fp16
            continue
        micro_steps = (1, 3)[(index + world_size) % 2]
        yield f"zero{stage}-{dtype}-{accumulate or dtype}-M{micro_steps}{'-offload' * offload}", {
            "stage": stage,
            "micro_steps": micro_steps,
            "languages": world_size,
            "dtype": dtype,
            "accumulate": accumulate,
            "offload": offload,
            "granularity": "layer" if micro_steps > 1 else "bucket",
            "clip": 0.8,
        }


def drawn(world_size: int) -> Iterator[tuple[str, Case]]:
    """Settings drawn anew in every run."""
    draw = random.Random(f"{SEED}/{world_size}")
    for index in range(6 if world_size == 2 else 3):
        stage = draw.choice(STAGES)
        yield f"drawn{index}", {
            "stage": stage,
            "micro_steps": draw.choice((1, 2, 3)),
            "languages": draw.randint(1, world_size + 2),
            "bucket_size": draw.choice(BUCKET_SIZES),
            "overlap": draw.random() < 0.5,
            "round_robin": draw.random() < 0.5,
            "clip": draw.choice((0.0, 0.4, 100.0)),
            "groups": draw.random() < 0.5,
            "aggregator": draw.choice(AGGREGATORS),
            "granularity": draw.choice(GRANULARITIES),
            "weighting": draw.choice(("language", "token")),
            "normalize": draw.choice(("none", "unit")),
            "rescale": draw.choice(("none", "mean")),
            "frozen": draw.random() < 0.3,
            "tied": draw.random() < 0.3,
            "adapters": draw.choice((0, 0, 1)),
            "small": draw.random() < 0.5,
            "offload": draw.random() < 0.3 and stage > 0,
            "affinity": draw.choice(("window", "micro_step")),
        }


def cases_of(world_size: int) -> dict[str, Case]:
    named = itertools.chain(*(source(world_size) for source in (grid, features, nodes, half_precision, drawn)))
    return {name: case | {"seed": SEED + index} for index, (name, case) in enumerate(named)}


CASES = {world_size: cases_of(world_size) for world_size in WORLD_SIZES}
KEYS = [(world_size, name) for world_size in WORLD_SIZES for name in CASES[world_size]]


def exchanges(case: Case) -> int:
    """Exchanges a window: ZeRO-1 has one where ranks keep their languages, and else is not asked."""
    return 1 if case["stage"] == 1 and case.get("affinity") != "micro_step" else int(case["micro_steps"])


def runs_twice(world_size: int, case: Case) -> bool:
    """With 2 ranks every case of ZeRO-1 and 2; else those that stream, whose second run takes another path. (ZeRO-3
    takes three times as long.)"""
    streams = exchanges(case) == 1 and case.get("granularity", "bucket") == "bucket"
    return streams or (world_size == 2 and case["stage"] < 3)


def name_of(key: Key) -> str:
    return f"W{key[0]}-{key[1]}"


every_case = pytest.mark.parametrize("key", KEYS, ids=name_of)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[Key, list[dict[str, Any]]]]:
    """The results of all ranks of every case that has been asked for so far; starts each world size once."""
    found = _Outcomes()
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    yield found
    target = os.environ.get("BUCKETMOO_PARITY_JSON")
    if target and len(found) == len(KEYS):
        Path(target).write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")


class _Outcomes(dict[Key, list[dict[str, Any]]]):
    def __missing__(self, key: Key) -> list[dict[str, Any]]:
        world_size = key[0]
        cases = CASES[world_size]
        runs = [case | {"modes": MODES[: 1 + runs_twice(world_size, case)]} for case in cases.values()]
        results = launch.run("compare_with_reference.py", world_size, runs, timeout=300)
        self.update({(world_size, name): result for name, result in zip(cases, results, strict=True)})
        return self[key]


def explain(key: Key) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {CASES[key[0]][key[1]]}"


@every_case
def test_combined_gradient_is_the_reference(key: Key, outcomes: dict[Key, list[dict[str, Any]]]) -> None:
    for result in outcomes[key]:
        assert "error" not in result, f"{result}, {explain(key)}"
        assert result["gradient"] <= tolerance(CASES[key[0]][key[1]]), f"{result}, {explain(key)}"


@every_case
def test_norm_and_update_are_the_reference(key: Key, outcomes: dict[Key, list[dict[str, Any]]]) -> None:
    case = CASES[key[0]][key[1]]
    # The norm is summed in float32 over about 3,000 squares, in partial sums: 1e-6. The update of a float32 parameter
    # is rounded to float32 relative to the parameter; an error e of the gradient moves it by 0.05 e |g| / |p| only,
    # and no parameter's gradient is 20 times its norm here.
    limit = max(tolerance(case), 1e-6)
    for result in outcomes[key]:
        assert result["norm"] <= limit, f"{result}, {explain(key)}"
        assert result["update"] <= limit, f"{result}, {explain(key)}"


@every_case
def test_ranks_hold_the_same_bits(key: Key, outcomes: dict[Key, list[dict[str, Any]]]) -> None:
    assert len({result["parameters"][0] for result in outcomes[key]}) == 1, explain(key)


@pytest.mark.parametrize("key", [key for key in KEYS if runs_twice(key[0], CASES[key[0]][key[1]])], ids=name_of)
def test_second_run_and_other_mode_give_the_same_bits(key: Key, outcomes: dict[Key, list[dict[str, Any]]]) -> None:
    """The second run is deferred: it repeats a first one that was deferred too, and else compares the two modes."""
    case = CASES[key[0]][key[1]]
    for result in outcomes[key]:
        automatic, deferred = result["streaming"]
        assert not deferred
        if exchanges(case) > 1 and case["stage"] != 1:
            assert not automatic, "rows of several micro-steps cannot be resolved while streaming"
        elif case.get("granularity", "bucket") == "bucket":
            assert automatic, "this test would not compare the two modes"
        assert result["parameters"][0] == result["parameters"][1], explain(key)


def summary(outcomes: dict[Key, list[dict[str, Any]]]) -> dict[str, Any]:
    """The largest errors by world size, stage and dtypes, with what they were measured on."""
    worst: dict[str, dict[str, float]] = {}
    for (world_size, name), results in outcomes.items():
        case = CASES[world_size][name]
        dtype = case.get("dtype", "fp32")
        label = f"W={world_size} ZeRO-{case['stage']} {dtype}"
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
