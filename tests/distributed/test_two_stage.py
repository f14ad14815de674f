"""Two nodes of two ranks, and two replicas of two shards (HSDP), under FSDP2: gradients equal the float64 reference,
and they go by node where the languages allow it.

All cases run in one start of four processes. The data, the model and some settings are drawn anew in every run, from a
seed that every failure names and that the environment variable `BUCKETMOO_TEST_SEED` sets; so is whether nodes or
replicas have what has to hold for both, and which half of what one alone has. The nightly list has all. Other numbers
of nodes and ranks: tests/unit/test_by_node.py.
"""

from __future__ import annotations

import math
import random
from typing import Any

import launch
import pytest
import torch
from distributed.not_finite import check_not_finite
from distributed.tolerances import ROUNDING
from draw import SEED, Case, some

WORLD_SIZE, INSIDE = 4, 2
BY_NODE, MIXED, OTHER = [0, 0, 1, 1], [0, 1, 1, 0], [2, 2, 1, 1]


def either() -> dict[str, Case]:
    """What has to hold for nodes as for replicas."""
    once: Case = {"micro_steps": 2, "table": [BY_NODE] * 2, "once_a_window": True}
    return {
        "streaming": {"table": [BY_NODE]},
        "deferred": {"table": [BY_NODE], "mode": "deferred"},
        "windows": {"micro_steps": 2, "table": [BY_NODE, OTHER], "languages": 3, "granularity": "layer"},
        "mixed_at_times": {"micro_steps": 3, "table": [BY_NODE, MIXED, OTHER], "languages": 3, "weighting": "token"},
        "once": once | {"empty": True, "granularity": "parameter"},
        "no_target": {"table": [BY_NODE], "empty": True, "aggregator": "upgrad"},
        "bf16": {"table": [BY_NODE], "dtype": "bf16", "aggregator": "mean"},
    }


def only_nodes() -> dict[str, Case]:
    return {
        "asked_for": {"table": [BY_NODE], "exchange": "two_stage"},
        "one_language": {"table": [[1] * 4], "aggregator": "cagrad"},
        "row_storage": {"micro_steps": 2, "table": [BY_NODE] * 2, "row_storage": "host"},
    }


def only_replicas() -> dict[str, Case]:
    """With other ways to go, shards that replicas do not divide, and gradients that FSDP2 does not make."""
    return {
        "flat": {"table": [BY_NODE], "exchange": "flat"},
        "other_nodes": {"table": [BY_NODE], "ranks_per_node": 4},
        "four_languages": {"table": [[0, 1, 2, 3]], "languages": 4, "granularity": "parameter"},
        "bf16-reduced-in-fp32": {"table": [BY_NODE], "dtype": "bf16", "shard": {"reduce_dtype": torch.float32}},
        "offload": {"micro_steps": 2, "table": [BY_NODE] * 2, "offload": True, "clip": 0.2, "granularity": "model"},
        "flat_parameters": {"model": "flat", "table": [BY_NODE], "granularity": "parameter"},
        "lora": {"model": "lora", "table": [BY_NODE], "shard": {"by_column": True}},
        "unused": {"adapters": 3, "used_adapters": [0, 1, 0, 1], "table": [BY_NODE]},
        "apart": {"adapters": 1, "shard": {"apart": True}, "table": [BY_NODE]},
        "checkpoint": {"checkpoint": "reentrant", "tied": True, "reshard": False, "table": [MIXED]},
    }


def drawn() -> dict[str, Case]:
    draw = random.Random(SEED)
    found: dict[str, Case] = {}
    for index in range(1):
        micro_steps = draw.choice((1, 2, 3))
        found[f"drawn{index}"] = {
            "micro_steps": micro_steps,
            "languages": 3,
            "table": [draw.choice((BY_NODE, OTHER, MIXED)) for _ in range(micro_steps)],
            "aggregator": draw.choice(("mgda", "mean", "pcgrad", "cagrad", "upgrad")),
            "granularity": draw.choice(("bucket", "parameter", "layer", "model")),
            "weighting": draw.choice(("language", "token")),
            "empty": draw.random() < 0.3,
            "offload": draw.random() < 0.3,
        }
    return found


def cases() -> dict[str, Case]:
    nodes = {name: {"ranks_per_node": INSIDE} | case for name, case in (either() | only_nodes() | drawn()).items()}
    replicas = {name: {"replicas": 2} | case for name, case in (either() | only_replicas() | drawn()).items()}
    found = {f"nodes-{name}": case for name, case in nodes.items()}
    found |= {f"replicas-{name}": case for name, case in replicas.items()}
    seeds = {name: SEED + index for index, name in enumerate(found)}
    seeds |= {one: seeds[other] for one, other in SAME_BITS}
    return {name: case | {"seed": seeds[name]} for name, case in found.items()}


SAME_BITS = [
    ("nodes-deferred", "nodes-streaming"),
    ("nodes-asked_for", "nodes-streaming"),
    ("replicas-deferred", "replicas-streaming"),
]
CASES = cases()
NOT_FINITE: list[Case] = [
    {
        "scenario": "not_finite",
        "wrapper": "fsdp2",
        "how": {"replicas": 2},
        "micro_steps": 1,
        "value": math.nan,
        "where": None,
        "mode": mode,
        "on_nonfinite": on_nonfinite,
    }
    for mode in ("streaming", "deferred")
    for on_nonfinite in ("drop", "keep")
]
MIXED_NODES = [{"scenario": "mixed_nodes", "once_a_window": once} for once in (False, True)]
RESUMED = {"scenario": "resumed", "seed": SEED, "replicas": 2, "micro_steps": 2}
ALIKE, UNLIKE = ({"scenario": "unlike_nodes", "sizes": sizes} for sizes in ([2, 2, 2, 2], [2, 2, 4, 4]))
SCENARIOS = [*MIXED_NODES, RESUMED, ALIKE, UNLIKE]


Results = list[tuple[Case, list[Any]]]  # cases and scenarios, with what came of them on all ranks


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest) -> Results:
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    mine = [item for item in request.session.items if item.path == request.path]
    tests = [item.callspec.params for item in mine if hasattr(item, "callspec")]
    asked = {test.get("name") for test in tests} | {name for pair in SAME_BITS for name in pair}
    cases = [case for name, case in CASES.items() if name in asked]
    cases += [case for case in NOT_FINITE if any(test.get("case") is case for test in tests)] + SCENARIOS
    return list(zip(cases, launch.run("by_node.py", WORLD_SIZE, cases, timeout=300), strict=True))


@pytest.fixture(scope="module")
def outcomes(everything: Results) -> dict[str, list[dict[str, Any]]]:
    return {name: results for name, case in CASES.items() for ran, results in everything if ran is case}


def scenario(everything: Results, case: Case) -> list[Any]:
    return next(results for ran, results in everything if ran is case)


def drawn_names() -> set[str]:
    """What this run takes, and what other tests compare it with."""
    draw = random.Random(SEED)
    found = {name for pair in SAME_BITS for name in pair}
    found |= {f"{draw.choice(('nodes', 'replicas'))}-{name}" for name in (*draw.sample(list(either()), 4), *drawn())}
    for kind, alone in (("nodes", only_nodes()), ("replicas", only_replicas())):
        found |= {f"{kind}-{name}" for name in draw.sample(list(alone), len(alone) // 3)}
    return found


def explain(name: str) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {name}: {CASES[name]}"


def tolerance(case: Case) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows.

    float32, as in test_fsdp2.py: 5e-7; nodes add no rounding but that of another order of sums. Where gradients travel
    in bf16 a node's two ranks scale theirs to one number of tokens, and add them up: three roundings.
    """
    return 3 * ROUNDING["bf16"] if case.get("dtype") == "bf16" and "shard" not in case else 5e-7


DRAWN = drawn_names()
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DRAWN else pytest.mark.nightly) for name in CASES]
)


@every_case
def test_gradients_are_those_of_the_reference(name: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for result in outcomes[name]:
        assert "error" not in result, f"{result}, {explain(name)}"
        assert result["gradient"] <= tolerance(CASES[name]), f"{result}, {explain(name)}"
    for what in ("parameters", "decided"):
        assert len({result[what] for result in outcomes[name]}) == 1, explain(name)


@every_case
def test_gradients_go_by_node_where_languages_allow_it(name: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    case = CASES[name]
    table = case["table"][:1] if case.get("once_a_window") else case["table"]
    # Rank 0 has no target token in an empty case's last micro-step, and so does not mix its node.
    taken = [row[1:] if case.get("empty") and step == len(table) - 1 else row for step, row in enumerate(table)]
    alike = [len(set(row[:-INSIDE])) == len(set(row[-INSIDE:])) == 1 for row in taken]
    asked = case.get("exchange") != "flat" and case.get("ranks_per_node", INSIDE) == INSIDE
    for result in outcomes[name]:
        assert ("all_to_all (nodes)" in result["sent"]) == (asked and any(alike)), explain(name)
        assert ("all_to_all" in result["sent"]) == (not asked or not all(alike)), explain(name)
        assert ("all_gather (combined)" in result["sent"]) == ("replicas" in case)


@pytest.mark.parametrize(("one", "other"), SAME_BITS)
def test_modes_give_the_same_bits(one: str, other: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for mine, theirs in zip(outcomes[one], outcomes[other], strict=True):
        assert mine["parameters"] == theirs["parameters"], explain(one)
        assert mine["decided"] == theirs["decided"], explain(one)


@pytest.mark.parametrize(
    "case",
    some([(case,) for case in NOT_FINITE], 2),
    ids=lambda case: f"{case['mode']}-{case['on_nonfinite']}",
)
def test_replicas_drop_or_keep_together(case: Case, everything: Results) -> None:
    """FSDP2 makes no `.grad` with replicas: there has to be one that a `GradScaler` finds."""
    check_not_finite(scenario(everything, case), case)


@pytest.mark.parametrize("case", MIXED_NODES, ids=lambda case: f"once_a_window={case['once_a_window']}")
def test_mixed_nodes_are_refused_where_two_stages_were_asked_for(case: Case, everything: Results) -> None:
    for result in scenario(everything, case):
        assert result["error"] == "LanguageError", result
        for words in ('exchange = "two_stage"', "ranks_per_node=2", "bucketmoo plan", 'use "auto"'):
            assert words in result["message"]


def test_resumed_run_has_the_bits_of_one_that_went_on(everything: Results) -> None:
    for result in scenario(everything, RESUMED):
        assert result["resumed"] == result["whole"], f"BUCKETMOO_TEST_SEED={SEED}"


def test_nodes_are_taken_from_torchrun_where_all_are_alike(everything: Results) -> None:
    for result in scenario(everything, ALIKE):
        assert result["nodes"] == 2
    for result in scenario(everything, UNLIKE):
        assert result["nodes"] == 1
        assert "all_to_all" in result["sent"]
