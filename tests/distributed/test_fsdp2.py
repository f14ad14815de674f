"""FSDP2: gradients equal the float64 reference on 1 to 4 ranks; without conflicts to resolve they are plain FSDP2's.

All cases of a world size run in one start of its processes. The data, the model and half of the settings are drawn
anew in every run, from a seed that every failure names and that the environment variable `BUCKETMOO_TEST_SEED` sets.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any

import launch
import pytest
import torch

SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
WORLD_SIZES = (1, 2, 3, 4)
AGGREGATORS = ("mgda", "mean", "pcgrad", "cagrad", "upgrad")
GRANULARITIES = ("bucket", "parameter", "layer", "model")

Case = dict[str, Any]
Key = tuple[int, str]


def grid(world_size: int) -> Iterator[tuple[str, Case]]:
    """Windows of 1 to 4 micro-steps, and fewer, as many and more languages than ranks; the other settings go round. On
    3 and 4 ranks every second one of these, drawn anew in every run."""
    languages = sorted({max(world_size - 1, 1), world_size, world_size + 2})
    for index, (micro_steps, count) in enumerate(itertools.product((1, 2, 3, 4), languages)):
        if world_size > 2 and (index + SEED) % 2:
            continue
        yield f"M{micro_steps}-K{count}", {
            "micro_steps": micro_steps,
            "languages": count,
            "aggregator": AGGREGATORS[index % len(AGGREGATORS)],
            "granularity": GRANULARITIES[(index + index // 4) % len(GRANULARITIES)],
            "weighting": ("language", "token")[index // 2 % 2],
            "reshard": index % 2 == 0,
        }


def features(world_size: int) -> Iterator[tuple[str, Case]]:
    """Every setting that changes the path of a gradient, by itself."""
    two: Case = {"micro_steps": 2, "languages": 3}
    once: Case = {"micro_steps": 3, "languages": world_size, "once_a_window": True}
    everywhere: dict[str, Case] = {
        "equal_tokens": two | {"ragged": False},
        "once": once,
        "no_target": two | {"empty": True, "granularity": "layer"},
        "once-no_target": once | {"empty": True, "granularity": "parameter"},
        "bf16": {"dtype": "bf16"},
        "flat": {"model": "flat", "granularity": "parameter"},
        "rows-host": two | {"row_storage": "host", "granularity": "layer"},
        "rows-bfloat16": two | {"row_storage": "bfloat16", "aggregator": "mean"},
        "mesh-2d": {"shard": {"mesh_2d": True}},
        "unused": two | {"adapters": 3, "used_adapters": [rank % 2 for rank in range(world_size)]},
        "clip": two | {"clip": 0.5},
        "lora": two | {"model": "lora"},
        "by_column": {"model": "lora", "shard": {"by_column": True}},
    }
    on_two: dict[str, Case] = {
        "tied": two | {"tied": True},
        "frozen": two | {"frozen": True, "granularity": "parameter"},
        "offload": {"offload": True},
        "offload-deferred": two | {"offload": True, "clip": 0.1},
        "no_reentrant": two | {"checkpoint": "no_reentrant"},
        "reentrant": {"checkpoint": "reentrant"},
        "reentrant-once": once | {"checkpoint": "reentrant"},
        "no_reshard": two | {"reshard": False},
        "together": {"shard": {"together": True}},
        "apart": two | {"adapters": 2, "shard": {"apart": True}},
        "assign": two | {"shard": {"assign": True}},
        "after_evaluation": {"shard": {"evaluate": True}},
        "outputs-dict": two | {"model": "dict"},
        "outputs-dict-once": once | {"model": "dict"},
        "outputs-dataclass": {"model": "dataclass"},
        "outputs-dataclass-once": once | {"model": "dataclass"},
        "outputs-cast": {"shard": {"output_dtype": torch.float64}},
        "bf16-deferred": two | {"dtype": "bf16", "granularity": "layer"},
        "bf16-reduced-in-fp32": two | {"dtype": "bf16", "shard": {"reduce_dtype": torch.float32}},
        "bf16-once": once | {"dtype": "bf16", "ragged": False, "aggregator": "mean"},
        "bf16-once-in-fp32": once | {"dtype": "bf16", "ragged": False, "shard": {"reduce_dtype": torch.float32}},
        "bf16-parameters": two | {"dtype": "bf16", "shard": {"bf16_parameters": True}},
        "compile": two | {"compile": True},
    }
    for index, (name, case) in enumerate(everywhere.items()):
        if world_size < 3 or (index + world_size) % 2:
            yield name, case
    if world_size == 2:
        yield from on_two.items()


def drawn(world_size: int) -> Iterator[tuple[str, Case]]:
    """Settings drawn anew in every run."""
    draw = random.Random(f"{SEED}/{world_size}")
    for index in range(4 if world_size == 2 else 2):
        micro_steps = draw.choice((1, 2, 3, 4))
        yield f"drawn{index}", {
            "micro_steps": micro_steps,
            "languages": draw.randint(1, world_size + 2),
            "once_a_window": draw.random() < 0.3,
            "reshard": draw.random() < 0.5,
            "offload": draw.random() < 0.3,
            "clip": draw.choice((0.0, 0.4, 100.0)),
            "aggregator": draw.choice(AGGREGATORS),
            "granularity": draw.choice(GRANULARITIES),
            "weighting": draw.choice(("language", "token")),
            "frozen": draw.random() < 0.3,
            "tied": draw.random() < 0.3,
            "empty": micro_steps * world_size > 1 and draw.random() < 0.3,
        }


def cases_of(world_size: int) -> dict[str, Case]:
    named = itertools.chain(*(source(world_size) for source in (grid, features, drawn)))
    return {name: case | {"seed": SEED + index} for index, (name, case) in enumerate(named)}


CASES = {world_size: cases_of(world_size) for world_size in WORLD_SIZES}
KEYS = [(world_size, name) for world_size in WORLD_SIZES for name in CASES[world_size]]


def exchanges(case: Case) -> int:
    return 1 if case.get("once_a_window") else int(case.get("micro_steps", 1))


def streams(case: Case) -> bool:
    """A window has one exchange, and blocks lie within buckets, which are the layers and what is left."""
    return exchanges(case) == 1 and case.get("granularity") != "model"


def runs_twice(key: Key) -> bool:
    """On 2 ranks, the grid and what streams; the second run is deferred, and compares the two modes."""
    world_size, case = key[0], CASES[key[0]][key[1]]
    # While streaming, a Gram of 16-bit rows is added up in another order than one of float32 rows (see engine.py).
    return world_size == 2 and (key[1].startswith("M") or streams(case)) and case.get("dtype") != "bf16"


def tolerance(case: Case) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows.

    Rows are kept, and the combined gradient is written, in float32 (relative rounding 6e-8); a row of M micro-steps
    adds M - 1 roundings and M scalings: below 5e-7 up to M = 4. So it is with gradients of bf16, which are the input of
    both sides. What is rounded to bf16 (2^-9 of it each time) is:

    * the sum of a rank's M micro-steps with `once_a_window`, M - 1 times, where FSDP2 adds up in bf16. The partial sums
      may be larger than the row, which 2^-8 allows for.
    * rows kept in bf16: once for each micro-batch, and once more for the scale of the first.
    * the combined gradient of bf16 parameters, once.
    """
    shard = case.get("shard", {})
    if case.get("row_storage") == "bfloat16":
        return (case["micro_steps"] + 1) * 2.0**-8
    if shard.get("bf16_parameters"):
        return 2.0**-9 + 5e-7
    if case.get("dtype") == "bf16" and case.get("once_a_window") and "reduce_dtype" not in shard:
        return (case["micro_steps"] - 1) * 2.0**-8
    return 5e-7


def name_of(key: Key) -> str:
    return f"W{key[0]}-{key[1]}"


def explain(key: Key) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {CASES[key[0]][key[1]]}"


class _Outcomes(dict[Key, list[dict[str, Any]]]):
    """The results of all ranks of a case; starts each world size once, when it is asked for first. A name with "again"
    is the second run."""

    def __missing__(self, key: Key) -> list[dict[str, Any]]:
        world_size = key[0]
        cases = dict(CASES[world_size])
        twice = [name for name in cases if runs_twice((world_size, name))]
        cases |= {f"{name} again": cases[name] | {"mode": "deferred"} for name in twice}
        found = launch.run("wrapped.py", world_size, list(cases.values()), timeout=300)
        self.update({(world_size, name): results for name, results in zip(cases, found, strict=True)})
        return self[key]


@pytest.fixture(scope="module")
def outcomes() -> Iterator[_Outcomes]:
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    yield _Outcomes()


every_case = pytest.mark.parametrize("key", KEYS, ids=name_of)


@every_case
def test_gradients_are_those_of_the_reference(key: Key, outcomes: _Outcomes) -> None:
    case = CASES[key[0]][key[1]]
    for result in outcomes[key]:
        assert "error" not in result, f"{result}, {explain(key)}"
        assert result["gradient"] <= tolerance(case), f"{result}, {explain(key)}"
        assert result["streaming"] == streams(case), explain(key)
        assert result["counters"] == {"windows": 2}


@every_case
def test_ranks_decide_alike(key: Key, outcomes: _Outcomes) -> None:
    results = outcomes[key]
    for what in ("parameters", "decided"):
        assert len({result[what] for result in results}) == 1, explain(key)


@pytest.mark.parametrize("key", [key for key in KEYS if runs_twice(key)], ids=name_of)
def test_second_run_and_other_mode_give_the_same_bits(key: Key, outcomes: _Outcomes) -> None:
    first, second = outcomes[key], outcomes[key[0], f"{key[1]} again"]
    for result, again in zip(first, second, strict=True):
        assert "error" not in again, f"{again}, {explain(key)}"
        assert not again["streaming"]
        assert result["parameters"] == again["parameters"], explain(key)
        assert result["decided"] == again["decided"], explain(key)


@pytest.mark.parametrize("storage", ["host", "bfloat16"])
def test_rows_are_stored_as_told(storage: str, outcomes: _Outcomes) -> None:
    """The toy model's rows on 2 ranks, of three languages."""
    plain, stored = (outcomes[2, name][0] for name in ("equal_tokens", f"rows-{storage}"))
    assert stored["row_bytes"] == plain["row_bytes"] // (2 if storage == "bfloat16" else 1) > 0
    if storage == "bfloat16":  # were they not, no rounding of 2^-9 would show
        assert stored["gradient"] > 1e-5


@pytest.fixture(scope="module")
def against_plain() -> list[dict[str, Any]]:
    return [rank for (rank,) in zip(*launch.run("fsdp2_against_plain.py", 3, [{"seed": SEED}]), strict=True)]


def test_importing_changes_nothing(against_plain: list[dict[str, Any]]) -> None:
    for result in against_plain:
        assert "error" not in result, result
        assert result["before_import"] == result["after_import"]


@pytest.mark.parametrize("name", ["mean", "one_language"])
def test_without_conflicts_gradients_are_averaged(name: str, against_plain: list[dict[str, Any]]) -> None:
    """`mean` over languages that feed equally many tokens, and any rule over one language.

    Each side adds up W gradients in float32, in its own order, and divides or multiplies the sum: W + 2 roundings of
    2^-24 at most, each of a partial sum no larger than the sum of the gradients' sizes. The bound is in units of the
    sum of sizes over W, element by element; both sides may be off.
    """
    for result in against_plain:
        assert result[name] <= 2 * (3 + 2) * 2.0**-24, f"{result}, BUCKETMOO_TEST_SEED={SEED}"
