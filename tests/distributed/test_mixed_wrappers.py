"""Batches that mix languages, under every wrapper and ZeRO stage: what the optimizer is handed is the reference's
combined gradient, for weights given by hand.

float64: to 1e-12 of the norms of the weighted rows. Where DeepSpeed trains in float32, the forward and backward pass
alone, of a handful of layers, are off by some 1e-7 (a rounding is 6e-8); 5e-7 is allowed. In 16 bits each of a
handful of roundings in a chain is half a unit in the last place, so four of them are allowed.
"""

from __future__ import annotations

import random

import pytest
from draw import SEED, Case, Key, parametrized
from outcomes import Outcomes

ZERO = {"wrapper": "zero", "dtype": "float32"}
WAYS: dict[str, Case] = {
    "single": {"wrapper": "single"},
    "ddp": {"wrapper": "ddp"},
    "ddp_before": {"wrapper": "ddp", "before": True, "no_sync": True},
    "ddp_autocast_bf16": {"wrapper": "ddp", "dtype": "float32", "autocast": True},
    "ddp_static": {"wrapper": "ddp", "how": {"static_graph": True}},
    "ddp_unused": {
        "wrapper": "ddp",
        "how": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
        "unused": True,
    },
    "fsdp1": {"wrapper": "fsdp1", "no_sync": True},
    "fsdp1_original": {"wrapper": "fsdp1", "how": {"use_orig_params": True}},
    "fsdp2": {"wrapper": "fsdp2"},
    "fsdp2_before": {"wrapper": "fsdp2", "before": True},
    "fsdp2_kept": {"wrapper": "fsdp2", "how": {"reshard_after_forward": False}, "no_sync": True},
    "fsdp2_replicas": {"wrapper": "fsdp2", "how": {"replicas": True}},
    "fsdp2_reentrant": {"wrapper": "fsdp2", "checkpoint": "reentrant"},
    "fsdp2_offload": {"wrapper": "fsdp2", "how": {"offload": True}},
    "fsdp2_bf16": {"wrapper": "fsdp2", "how": {"bf16": True}},
    "zero0": ZERO | {"stage": 0},
    "zero1": ZERO | {"stage": 1, "file": True},
    "zero2": ZERO | {"stage": 2, "unused": True},
    "zero3": ZERO | {"stage": 3},
    "zero3_reentrant": ZERO | {"stage": 3, "checkpoint": "reentrant"},
    "zero3_init": ZERO | {"stage": 3, "init": True},
    "zero2_offload": ZERO | {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "zero2_bf16": ZERO | {"stage": 2, "top": {"bf16": {"enabled": True}}},
    "zero3_fp16": ZERO | {"stage": 3, "top": {"fp16": {"enabled": True, "initial_scale_power": 8}}},
}
WINDOWS: dict[str, Case] = {"one": {}, "two": {"micro_steps": 2, "expect": True}}
BATCHES: dict[str, Case] = {"sequences": {}, "packed": {"packed": True}}
SHAPES: tuple[Case, ...] = (
    {},
    {"tied": True},
    {"frozen": True},
    {"granularity": "layer"},
    {"checkpoint": "no_reentrant"},
)
# Of a whole model; the largest of a block may be several times as much.
TOLERANCES = {"float64": 1e-12, "float32": 5e-7, "bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11}


def all_cases() -> dict[Key, Case]:
    found: dict[Key, Case] = {}
    for way, arguments in WAYS.items():
        for world_size in (1,) if way == "single" else (1, 2, 3):
            for window, of_window in WINDOWS.items():
                for batch, of_batch in BATCHES.items():
                    name = f"{way}-{window}-{batch}"
                    draw = random.Random(f"{SEED}/{world_size}/{name}")
                    seed = {"seed": draw.randrange(10**6)}
                    found[world_size, name] = draw.choice(SHAPES) | arguments | of_window | of_batch | seed
    return found


CASES = all_cases()


def drawn() -> set[Key]:
    """Each way once, on some number of ranks; of the windows and batches, both in turn."""
    draw = random.Random(f"{SEED}/mixed")
    found: set[Key] = set()
    for number, way in enumerate(WAYS):
        window, batch = list(WINDOWS)[(SEED + number) % 2], list(BATCHES)[(SEED + number) // 2 % 2]
        found.add((1 if way == "single" else draw.choice((1, 2, 2, 3)), f"{way}-{window}-{batch}"))
    return found


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return Outcomes(request, "mixed_wrappers.py", CASES)


@parametrized(CASES, drawn())
def test_the_combined_gradient_is_the_references(key: Key, outcomes: Outcomes) -> None:
    way = key[1].split("-")[0]
    precision = next((each for each in ("bf16", "fp16") if each in way), CASES[key].get("dtype", "float64"))
    for result in outcomes[key]:
        assert result["gradient"] <= TOLERANCES[precision], f"{result}, {outcomes.explain(key)}"
        assert result["told"] <= TOLERANCES[precision], f"{result}, {outcomes.explain(key)}"
        # The weights are the rule's own, for the window's tokens are known before the first backward.
        assert result["weights"] <= 1e-15, f"{result}, {outcomes.explain(key)}"
