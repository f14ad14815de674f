"""DDP, FSDP1 and FSDP2: gradients equal the float64 reference on 1 to 4 ranks, and all ways to them give the same bits.

The data, the model and the settings are drawn anew in every run: any two values of two settings of a wrapper meet in
one case of its array at least, on 1 to 3 ranks, and half of the features, each by itself, meet one number of ranks, of
1 to 4. The nightly list has another array of each, on 4 ranks too, and all features on every number of ranks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributed.tolerances import ROUNDING
from draw import SEED, Case, Key, few, one_world_size, pairwise, parametrized
from outcomes import Outcomes
from torch.distributed.fsdp import _common_utils

from bucketmoo_ds import aggregate

WORLD_SIZES = (1, 2, 3, 4)
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
# Plain FSDP2 of torch 2.11 finds no gradients in a dataclass: backward fails.
DATACLASSES = hasattr(_common_utils, "collect_grad_tensors")
FP32_WIRE = {"reduce_dtype": torch.float32}

# --- settings of which any two meet ---------------------------------------------------------------------------------

TARGETS: dict[str, Case] = {"ragged": {}, "even": {"ragged": False}, "none at times": {"empty": True}}
WINDOWS: dict[str, Case] = {
    "exchanged every micro-step": {},
    "deferred": {"mode": "deferred"},
    "once a window": {"once_a_window": True},
    "once a window, no_sync": {"once_a_window": True, "no_sync": True},
}
NUMBERS: dict[str, Case] = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "bf16, float32 wire": {"dtype": "bf16", "shard": FP32_WIRE},
}
COMMON: dict[str, tuple[Any, ...]] = {
    "world_size": WORLD_SIZES,
    "micro_steps": (1, 2, 3, 4),
    "more_languages": (-1, 0, 2),  # than ranks
    "aggregator": ("mgda", "mean", "pcgrad", "cagrad", "upgrad"),
    "granularity": ("bucket", "parameter", "layer", "model"),
    "weighting": ("language", "token"),
    "normalize": ("none", "loss"),
    "targets": tuple(TARGETS),
    "clip": (0.0, 0.4, 100.0),
    "frozen": (False, True),
    "tied": (False, True),
    "adapters": (0, 2),  # that nothing uses
}
# Values of a run's own arrays, which have fewer than those of the nightly list.
FEWER: Case = {
    "world_size": (1, 2, 3),
    "micro_steps": (1, 2, *few((3, 4), 1, "micro_steps")),
    "aggregator": few(COMMON["aggregator"], 3, "aggregator"),
    "granularity": few(COMMON["granularity"], 3, "granularity"),
}
FACTORS: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddp": COMMON
    | {
        "windows": tuple(WINDOWS),
        "numbers": ("fp32", "bf16"),
        "checkpoint": ("none", "no_reentrant"),
        # The toy model has about 3,100 elements: every parameter alone, several buckets, one bucket.
        "bucket_size": (1, 700, 10**9),
        "bucket_view": (False, True),
        "find_unused": (False, True),
    },
    "fsdp1": COMMON
    | {
        "windows": ("exchanged every micro-step", "deferred", "once a window, no_sync"),
        "numbers": ("fp32", "bf16", "bf16, float32 wire"),
        "checkpoint": ("none", "reentrant", "no_reentrant"),
        "strategy": STRATEGIES,
        "orig_params": (True, False),
        "offload": (False, True),
        "whole": (0, 2),  # layers that are NO_SHARD whatever the others are
    },
    "fsdp2": COMMON
    | {
        "windows": ("exchanged every micro-step", "deferred", "once a window"),
        "numbers": ("fp32", "bf16", "bf16, float32 wire"),
        "checkpoint": ("none", "reentrant", "no_reentrant"),
        "reshard": (True, False),
        "offload": (False, True),
    },
}
NEVER: dict[str, tuple[Callable[..., bool], ...]] = {
    "ddp": (
        lambda adapters, find_unused: adapters > 0 and not find_unused,  # DDP waits for their gradients
    ),
    "fsdp1": (),
    "fsdp2": (),
}
NEVER_ANYWHERE: tuple[Callable[..., bool], ...] = (
    # What a rank adds up in 16 bits is a row that is rounded: the features below have it, with an aggregator whose
    # weights do not depend on it.
    lambda windows, numbers: windows.startswith("once") and numbers != "fp32",
    # A window needs a target token.
    lambda world_size, micro_steps, targets: world_size * micro_steps == 1 and targets == "none at times",
)


def array(wrapper: str, number: int) -> Iterator[tuple[Key, Case]]:
    never = (*NEVER[wrapper], *NEVER_ANYWHERE)
    factors = FACTORS[wrapper] | ({} if number else FEWER)
    for index, drawn in enumerate(pairwise(factors, never, seed=f"{SEED}/{wrapper}/{number}")):
        case = dict(drawn)
        world_size = case.pop("world_size")
        case["languages"] = max(world_size + case.pop("more_languages"), 1)
        shard = {"whole": case.pop("whole")} if "whole" in case else {}
        case |= NUMBERS[case.pop("numbers")] | TARGETS[case.pop("targets")] | WINDOWS[case.pop("windows")]
        case["shard"] = case.get("shard", {}) | shard
        yield (world_size, f"{wrapper}-array{number}-{index}"), case


# --- what changes the path of a gradient, by itself -----------------------------------------------------------------

TWO: Case = {"micro_steps": 2, "languages": 3}
NODE: Case = {"ranks_per_node": 2, "exchange": "two_stage", "table": [[0, 0, 1, 1]]}
ON_NODES: dict[str, Case] = {
    "nodes": NODE,
    "nodes-deferred": NODE | {"micro_steps": 2, "table": [[0, 0, 1, 1], [1, 1, 2, 2]], "languages": 3},
    "nodes-once": NODE
    | {"micro_steps": 3, "table": [[0, 0, 1, 1]] * 3, "once_a_window": True, "no_sync": True, "ragged": False},
}


def everywhere(world_size: int) -> dict[str, dict[str, Case]]:
    """Features of each wrapper that any number of ranks has."""
    once: Case = {"micro_steps": 3, "languages": world_size, "once_a_window": True}
    apart = {"adapters": 3, "used_adapters": [rank % 2 for rank in range(world_size)]}
    return {
        "ddp": {
            "streaming": {"mode": "streaming", "bucket_view": True, "normalize": "loss"},
            "static_graph": TWO | {"static_graph": True},
            "static_graph-once": once | {"static_graph": True, "ragged": False},
            "reentrant": TWO | {"static_graph": True, "checkpoint": "reentrant"},
            "unused": TWO | apart | {"find_unused": True, "granularity": "parameter"},
            "unused-streaming": apart | {"find_unused": True, "bucket_view": True},
            "bf16": TWO | {"dtype": "bf16"},
            "bf16-view": TWO | {"dtype": "bf16", "bucket_view": True},
            "bf16-streaming": {"dtype": "bf16"},
            "rows-host": TWO | {"row_storage": "host", "granularity": "layer"},
            "rows-bfloat16": TWO | {"row_storage": "bfloat16", "aggregator": "mean", "languages": 1},
        },
        "fsdp1": {
            "streaming": {"mode": "streaming", "languages": world_size},
            "one_unit": TWO | {"shard": {"together": True}, "granularity": "parameter", "strategy": "SHARD_GRAD_OP"},
            "one_unit-flat": TWO | {"shard": {"together": True}, "granularity": "parameter", "orig_params": False},
            "frozen_in_a_unit": TWO | {"frozen": True, "tied": True, "shard": {"together": True}},
            "dictionary": TWO | {"model": "dict"},
            "dictionary-once": {"model": "dict", "micro_steps": 2, "once_a_window": True, "no_sync": True}
            | {"normalize": "loss_l2"},
            "dataclass": {"model": "dataclass"},
            "lora": TWO | {"model": "lora", "granularity": "parameter"},
            "small_parameters": TWO | {"model": "flat"},
            "bf16-once": once
            | {"dtype": "bf16", "micro_steps": 2, "no_sync": True, "ragged": False, "aggregator": "mean"},
            "rows-host": TWO | {"row_storage": "host", "granularity": "layer"},
            "rows-bfloat16": TWO | {"row_storage": "bfloat16", "aggregator": "mean", "languages": 1},
        },
        "fsdp2": {
            "flat": {"model": "flat", "granularity": "parameter"},
            "mesh-2d": {"shard": {"mesh_2d": True}},
            "unused": TWO | apart,
            "lora": TWO | {"model": "lora"},
            "by_column": {"model": "lora", "shard": {"by_column": True}},
            "together": {"shard": {"together": True}},
            "apart": TWO | {"adapters": 2, "shard": {"apart": True}},
            "assign": TWO | {"shard": {"assign": True}},
            "after_evaluation": {"shard": {"evaluate": True}},
            "outputs-dict": TWO | {"model": "dict"},
            "outputs-dict-once": once | {"model": "dict"},
            "outputs-dataclass": {"model": "dataclass"},
            "outputs-dataclass-once": once | {"model": "dataclass", "normalize": "loss"},
            "outputs-cast": {"normalize": "loss", "shard": {"output_dtype": torch.float64}},
            "bf16-once": once | {"dtype": "bf16", "ragged": False, "aggregator": "mean"},
            "bf16-once-in-fp32": once | {"dtype": "bf16", "ragged": False, "shard": FP32_WIRE},
            "bf16-parameters": TWO | {"dtype": "bf16", "shard": {"bf16_parameters": True}},
        },
    }


SOMEWHERE: dict[Key, Case] = {
    # What the wrappers meet is the compiler's front end; its back end takes half a minute, and is for the nightly list.
    (2, "ddp-compile"): {"compile": "aot_eager", "normalize": "loss"},
    (2, "fsdp2-compile"): TWO | {"compile": "aot_eager"},
    **{
        (2, f"fsdp1-bf16_result-{strategy}-{orig_params}"): TWO
        | {"dtype": "bf16", "strategy": strategy, "orig_params": orig_params}
        | {"shard": {"keep_low_precision_grads": True}}
        for strategy, orig_params in itertools.product(STRATEGIES, (True, False))
    },
    (2, "fsdp2-rows-float32"): TWO | {"ragged": False},
    (2, "fsdp2-rows-host"): TWO | {"row_storage": "host", "granularity": "layer"},
    (2, "fsdp2-rows-bfloat16"): TWO | {"row_storage": "bfloat16", "aggregator": "mean"},
    **{(world_size, "ddp-every micro-step"): {"micro_steps": 3, "languages": world_size} for world_size in (2, 3)},
    **{
        (world_size, "ddp-once a window"): {"micro_steps": 3, "languages": world_size} | WINDOWS["once a window"]
        for world_size in (2, 3)
    },
    **{(4, f"{wrapper}-{name}"): case for wrapper in ("ddp", "fsdp1") for name, case in ON_NODES.items()},
    (4, "fsdp1-nodes-whole"): NODE | {"strategy": "NO_SHARD"},
    (4, "fsdp1-nodes-mixed"): {"ranks_per_node": 2, "table": [[0, 1, 2, 3]], "languages": 4},
}

INDUCTOR: dict[Key, Case] = {
    (2, f"{wrapper}-inductor"): SOMEWHERE[2, f"{wrapper}-compile"] | {"compile": "inductor"}
    for wrapper in ("ddp", "fsdp2")
}

# --- what must give the same bits -----------------------------------------------------------------------------------

ONCE: Case = {"micro_steps": 3, "once_a_window": True}
SAME_BITS: dict[str, list[Case]] = {
    "ddp-one": [{}, {}, {"mode": "deferred"}, {"bucket_view": True}],
    "ddp-once": [ONCE | how for how in ({}, {"no_sync": True}, {"no_sync": True, "bucket_view": True})]
    + [ONCE | {"static_graph": True}],
    "fsdp1-one": [{}, {}, {"mode": "deferred"}, {"strategy": "SHARD_GRAD_OP"}],
    "fsdp1-two": [
        TWO | {"languages": 2} | how
        for how in ({}, {}, {"checkpoint": "no_reentrant"}, {"checkpoint": "reentrant"}, {"offload": True})
    ],
    "fsdp2-one": [{}, {}, {"mode": "deferred"}, {"reshard": False}, {"offload": True}],
    "fsdp2-two": [TWO | how for how in ({}, {}, {"checkpoint": "no_reentrant"}, {"checkpoint": "reentrant"})],
}
# DDP over one rank, and no DDP: the same blocks of the same rows.
ALONE: dict[Key, Case] = {
    (1, f"{wrapper}-alone"): {"languages": 3, "micro_steps": 3, "granularity": "layer"} for wrapper in ("ddp", "single")
}

ARRAYS = {number: dict(itertools.chain(*(array(wrapper, number) for wrapper in FACTORS))) for number in range(2)}
FEATURES: dict[Key, Case] = {
    (world_size, f"{wrapper}-{name}"): case
    for world_size in WORLD_SIZES
    for wrapper, cases in everywhere(world_size).items()
    for name, case in cases.items()
    if DATACLASSES or "outputs-dataclass" not in name
}
CASES: dict[Key, Case] = {
    key: case | {"wrapper": key[1].split("-")[0], "seed": SEED + index}
    for index, (key, case) in enumerate((ARRAYS[0] | ARRAYS[1] | FEATURES | SOMEWHERE | INDUCTOR).items())
}
ONE_SIZE = sorted(one_world_size(FEATURES))
DRAWN = [*ARRAYS[0], *random.Random(SEED).sample(ONE_SIZE, len(ONE_SIZE) // 2), *SOMEWHERE]


def exchanges(case: Case) -> int:
    return 1 if case.get("once_a_window") else int(case.get("micro_steps", 1))


def streams(case: Case) -> bool:
    """Whether buckets are resolved as they arrive, where no block lies in several."""
    mode, rule = case.get("mode", "auto"), aggregate.create(case.get("aggregator", "mgda"))
    few = int(case.get("languages", 4)) <= rule.streams_up_to
    return exchanges(case) == 1 and (mode == "streaming" or (mode == "auto" and few))


def runs_twice(key: Key) -> bool:
    """On 2 ranks, what streams: the second run is deferred. A Gram of 16-bit rows is added up in another order while
    streaming than one of float32 rows, which are those of a window."""
    case = CASES[key]
    return key[0] == 2 and streams(case) and "mode" not in case and "dtype" not in case


def again(key: Key) -> Key:
    return key[0], f"{key[1]} again"


def alike(name: str) -> list[Key]:
    return [(2, f"{name}-same{index}") for index in range(len(SAME_BITS[name]))]


TOGETHER: dict[Key, Case] = CASES | {again(key): CASES[key] | {"mode": "deferred"} for key in CASES if runs_twice(key)}
TOGETHER |= {
    key: {"languages": 2} | case | {"wrapper": name.split("-")[0], "seed": SEED}
    for name, cases in SAME_BITS.items()
    for key, case in zip(alike(name), cases, strict=True)
}
TOGETHER |= {key: case | {"wrapper": key[1].split("-")[0], "seed": SEED} for key, case in ALONE.items()}


def tolerance(key: Key) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows.

    Rows are kept, and the combined gradient is written, in float32 (relative rounding 6e-8); a row of M micro-steps
    adds M - 1 roundings and M scalings: below 5e-7 up to M = 4. So it is with gradients of bf16, which are the input of
    both sides. Under DDP and FSDP1 two kinds of cases differentiate otherwise than the reference does, a second source
    of the same size: compiled ones, and a rank that adds up micro-steps of unequal token counts, whose later outputs'
    gradients are scaled before they are propagated. What is rounded to bf16 (by 2^-8 of it at most, of its 8 bits; a
    block of few elements comes near that, the mean square of many is half as large) is:

    * the combined gradient of bf16 parameters, and of FSDP1's `keep_low_precision_grads`, once. Where it is clipped in
      bf16, which torch's `clip_grad_norm_` does, the norm, the factor and the product are, too.
    * the sum of a rank's M micro-steps with `once_a_window`, M - 1 times, where the wrapper adds up in bf16. The
      partial sums may be larger than the row, but not where all roundings are as large as they may be.
    * rows kept in bf16: once for each micro-batch of a row, M of them or, of one language, M W; and under FSDP2 once
      more for the scale of the first.
    """
    world_size, case = key[0], CASES[key]
    wrapper, shard = case["wrapper"], case.get("shard", {})
    micro_steps, once, bf16 = case.get("micro_steps", 1), case.get("once_a_window"), case.get("dtype") == "bf16"
    if case.get("row_storage") == "bfloat16":
        return (micro_steps + 1 if wrapper == "fsdp2" else micro_steps * world_size) * ROUNDING["bf16"]
    rounded = shard.get("keep_low_precision_grads") or shard.get("bf16_parameters")
    if rounded or (bf16 and (wrapper == "ddp" or (once and wrapper == "fsdp1"))):
        return (4 if wrapper == "ddp" and case.get("clip") else 1) * ROUNDING["bf16"] + 5e-7
    if bf16 and once and "reduce_dtype" not in shard:
        return (micro_steps - 1) * ROUNDING["bf16"]
    return 1e-6 if wrapper != "fsdp2" and (case.get("compile") or (once and case.get("ragged", True))) else 5e-7


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    also = itertools.chain(ALONE, *map(alike, SAME_BITS))
    return Outcomes(request, "wrapped.py", TOGETHER, also=also, timeout=550)


every_case = parametrized(CASES, DRAWN)


@every_case
def test_combined_gradient_is_the_reference(key: Key, outcomes: Outcomes) -> None:
    case = CASES[key]
    for result in outcomes[key]:
        assert "error" not in result, f"{result}, {outcomes.explain(key)}"
        assert result["gradient"] <= tolerance(key), f"{result}, {outcomes.explain(key)}"
        counters = {name: count for name, count in result["counters"].items() if name != "flat_micro_steps"}
        assert counters == {"windows": 2}
        within_buckets = case.get("granularity", "bucket") == "bucket"
        if case["wrapper"] == "fsdp2":  # whose buckets are the layers and what is left
            within_buckets = case.get("granularity") != "model"
        if exchanges(case) > 1 or within_buckets:
            assert result["streaming"] == streams(case), outcomes.explain(key)


@every_case
def test_ranks_hold_the_same_bits(key: Key, outcomes: Outcomes) -> None:
    for what in ("parameters", "decided"):
        assert len({result[what] for result in outcomes[key]}) == 1, outcomes.explain(key)


@parametrized(map(again, filter(runs_twice, CASES)), map(again, filter(runs_twice, DRAWN)))
def test_streaming_and_deferred_give_the_same_bits(key: Key, outcomes: Outcomes) -> None:
    first = key[0], key[1].removesuffix(" again")
    for result, deferred in zip(outcomes[first], outcomes[key], strict=True):
        assert "error" not in deferred, f"{deferred}, {outcomes.explain(key)}"
        assert not deferred["streaming"]
        for what in ("parameters", "decided"):
            assert result[what] == deferred[what], outcomes.explain(key)


@pytest.mark.parametrize("name", SAME_BITS)
def test_second_run_and_other_ways_give_the_same_bits(name: str, outcomes: Outcomes) -> None:
    """Twice the same; streaming and deferred; `.grad` as a view; under `no_sync` or not; parameters gathered once or
    twice, and offloaded; checkpoints."""
    found = {result["parameters"] for key in alike(name) for result in outcomes[key]}
    assert len(found) == 1, f"BUCKETMOO_TEST_SEED={SEED}"


def test_one_rank_is_one_process_alone(outcomes: Outcomes) -> None:
    ddp, single = (outcomes[key][0] for key in ALONE)
    assert ddp["parameters"] == single["parameters"], f"BUCKETMOO_TEST_SEED={SEED}"


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_of_ddp(world_size: int, outcomes: Outcomes) -> None:
    """A bucket of S W elements is scattered in every exchange and gathered once a window; nothing else is as large."""
    for name, number in (("every micro-step", 3), ("once a window", 1)):
        for result in outcomes[world_size, f"ddp-{name}"]:
            gathered = result["sent"]["all_gather (combined)"]
            assert gathered % (2 * (world_size - 1) * 8 * 4) == 0  # two windows of aligned float32 shards
            assert gathered >= 2 * 3100 * 4 * (world_size - 1) // world_size
            assert result["sent"]["all_to_all"] == number * gathered, f"BUCKETMOO_TEST_SEED={SEED}"


@pytest.mark.parametrize("key", [key for key in SOMEWHERE if "-nodes" in key[1] and "mixed" not in key[1]], ids=str)
def test_two_stages_keep_gradients_inside_a_node(key: Key, outcomes: Outcomes) -> None:
    for result in outcomes[key]:
        assert result["sent"]["all_to_all (nodes)"] > 0
        assert "all_to_all" not in result["sent"]


@pytest.mark.parametrize("storage", ["host", "bfloat16"])
def test_rows_are_stored_as_told(storage: str, outcomes: Outcomes) -> None:
    """The toy model's rows on 2 ranks, of three languages."""
    plain, stored = (outcomes[2, f"fsdp2-rows-{name}"][0] for name in ("float32", storage))
    assert stored["row_bytes"] == plain["row_bytes"] // (2 if storage == "bfloat16" else 1) > 0
    if storage == "bfloat16":  # were they not, no rounding to 8 bits would show
        assert stored["gradient"] > 1e-5
