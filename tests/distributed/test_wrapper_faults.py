"""FSDP2: what cannot be right ends in an error on every rank, never in a hang or in a plain average; a window that is
not finite is dropped or kept; a resumed run goes on with the same bits.

All scenarios run in one start of two processes.
"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import launch
import pytest
from distributed.not_finite import check_not_finite

SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
TIME_LIMIT = 60.0

Case = dict[str, Any]

# What `register` says to models and settings that it does not take; all but the last two name the function.
REFUSED: dict[str, list[str]] = {
    "not_sharded": ["ToyLM is no FSDP2 module", "fully_shard"],
    "several_groups": ['module "" has several parameter groups', "fully_shard to a module for each mesh"],
    "custom_reduce_scatter": ['the reduce-scatter of module "layers.1" is _Custom', "and set_custom_reduce_scatter"],
    "own_memory": ['module "" is ProcessGroupAllocReduceScatter', "leave out set_symm_mem_for_comm"],
    "all_reduce_hook": ['module "layers.0" has an all-reduce hook', "2-D mesh instead"],
    "optimizer_in_backward": ['module "" has a post-accumulate-grad hook', "step after backward"],
    "ignored": ['parameter "head.weight" is trained', "(1 in all)", "do not ignore it"],
    "added_later": ['parameter "adapters.0.weight" is trained', "(2 in all)", "adapters before fully_shard"],
    "nothing_to_train": ["no trainable parameter"],
    "tensor_parallel": ["tensor parallelism", "data-parallel meshes only"],
    "tensor_parallel_in_part": ["several meshes", "use one mesh"],
    "three_dimensions": ["a mesh of 3 dimensions", "one (FSDP) or two (HSDP)"],
    "several_meshes": ["several meshes", "use one mesh"],
    "replicas_without_shards": ["shards nothing", "use a 1-D mesh, or DDP"],
    "replicated": ["replicated, not sharded", "use fully_shard, or DDP"],
    "permuted": ["ranks do not ascend", "list them in order"],
    "twice": ["registered already"],
    "two_stages_on_one_node": ['exchange = "two_stage": 2 ranks with 2 a node', "ranks_per_node"],
    "streaming_over_layers": ['mode = "streaming"', 'use "auto" or "deferred"'],
}
OF_SETTINGS = ("two_stages_on_one_node", "streaming_over_layers")

DIFFERENCES = ("model", "frozen", "wrapping", "languages", "aggregator", "micro_steps", "once_a_window")
LAYOUTS = {
    "unfrozen": ['"layers.1.0.weight" was frozen or unfrozen', "do it before"],
    "frozen": ['"layers.0.0.weight" was frozen or unfrozen', "do it before"],
    "frozen in part": ['"layers.0.0.bias" was frozen or unfrozen', "do it before"],
    "added": ["2 parameters were added", "do it before"],
    "hook": ["post-accumulate-grad hook", "step after backward"],
    "reduce-scatter": ["the reduce-scatter was changed", "leave out"],
}

# (scenario, its arguments, the error's type, what the message says)
ERRORS: list[tuple[str, Case, str, list[str]]] = [
    *(("ranks_differ", {"what": what}, "DisagreementError", ["run one script on all"]) for what in DIFFERENCES),
    # What one rank alone knows of is told to the others: they would wait in the exchange.
    *(
        ("changed_layout", {"what": what, "ranks": ranks}, "LanguageError", [f"rank {ranks[0]}: ", "rank 1: ", *said])
        for what, said in LAYOUTS.items()
        for ranks in ([0, 1], [1])
    ),
    ("sync_off", {"ranks": [0, 1]}, "LanguageError", ["rank 0: set_requires_gradient_sync(False)", "rank 1: "]),
    ("sync_off", {"ranks": [1]}, "LanguageError", ["rank 1: set_requires_gradient_sync(False)", "once_a_window=True"]),
    ("wrong_language", {"rank": 1}, "LanguageError", ['rank 1: language "es" is not in']),
    ("changed_language", {}, "LanguageError", ['from language "de" to "fr" within a window', "keep one language"]),
    ("no_token_at_all", {}, "LanguageError", ["no language fed a target token"]),
    ("unused_left_out", {}, "BucketMOOError", ["were there at register", "leave out set_reduce_scatter_unused_params"]),
    ("called_twice", {}, "BucketMOOError", ["bucket 0 (layers.2.0", "second gradient", "contains all its calls"]),
    ("behind_the_outputs", {}, "BucketMOOError", ["did not pass through the model's outputs", "from its forward"]),
    ("closed", {}, "BucketMOOError", ["did not pass through the model's outputs", "do not close"]),
    ("not_the_root", {}, "LanguageError", ["a module inside of the model", "applied last"]),
    ("step_within_a_window", {}, "BucketMOOError", ["optimizer.step() after 1 of 2 micro-steps", "micro_steps"]),
    ("backward_after_the_boundary", {}, "BucketMOOError", ["optimizer.step() and optimizer.zero_grad() first"]),
    ("state_within_a_window", {}, "BucketMOOError", ["in the middle of a window", "at the boundary"]),
]

NOT_FINITE: list[Case] = [
    {
        "name": "not_finite",
        "mode": mode,
        "micro_steps": micro_steps,
        "value": value,
        "where": where,
        "on_nonfinite": on_nonfinite,
    }
    for mode, micro_steps, value, where, on_nonfinite in (
        ("streaming", 1, math.nan, None, "drop"),
        ("streaming", 1, math.inf, "layers.1", "drop"),
        ("deferred", 1, math.nan, "layers.1", "drop"),
        ("auto", 2, math.inf, None, "drop"),
        ("streaming", 1, math.inf, "layers.1", "keep"),
        ("auto", 2, math.nan, None, "keep"),
    )
]

RESUMED: list[Case] = [
    {"name": "resumed", "seed": SEED, "micro_steps": micro_steps, "once_a_window": once_a_window}
    for micro_steps, once_a_window in ((1, False), (2, False), (2, True))
]
# Whether another order of conflicts gives other bits depends on the data: with this seed it does.
FORGOTTEN: Case = {"name": "resumed", "seed": 5, "micro_steps": 2, "forget": True}

SCENARIOS: list[Case] = [
    *({"name": "refused", "case": case} for case in REFUSED),
    *({"name": name} | arguments for name, arguments, _, _ in ERRORS),
    *NOT_FINITE,
    *RESUMED,
    FORGOTTEN,
]


@pytest.fixture(scope="module")
def outcomes() -> list[list[Any]]:
    return launch.run("fsdp2_scenarios.py", 2, SCENARIOS)


def results(outcomes: list[list[Any]], **scenario: Any) -> list[Any]:
    return outcomes[SCENARIOS.index(scenario)]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start_up(outcomes: list[list[Any]], case: str) -> None:
    for result in results(outcomes, name="refused", case=case):
        assert result is not None, "it started"
        assert result["error"] == "ConfigError", result
        assert result["message"].startswith("bucket_moo." if case in OF_SETTINGS else "fsdp2.register: ")
        for words in REFUSED[case]:
            assert words in result["message"]


@pytest.mark.parametrize(("name", "arguments", "kind", "said"), ERRORS, ids=lambda value: str(value)[:40])
def test_error_on_every_rank(outcomes: list[list[Any]], name: str, arguments: Case, kind: str, said: list[str]) -> None:
    for result in results(outcomes, name=name, **arguments):
        assert result is not None, "no error"
        assert result["error"] == kind, result
        for words in said:
            assert words in result["message"]


@pytest.mark.parametrize("case", NOT_FINITE, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_window_that_is_not_finite(outcomes: list[list[Any]], case: Case) -> None:
    found = results(outcomes, **case)
    check_not_finite(found, case)
    first, second = found
    assert second["log"] == ""
    buckets = {bucket for _, bucket in first["nonfinite"]}
    # The gradients of what comes after the poisoned layer are well.
    assert buckets == set(first["buckets"][1 if case["where"] else 0 :])
    for bucket in buckets:
        assert f"language fr in {bucket}" in first["log"]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: "-".join(str(value) for value in list(case.values())[2:]))
def test_resumed_run_has_the_bits_of_one_that_went_on(outcomes: list[list[Any]], case: Case) -> None:
    for result in results(outcomes, **case):
        assert result.get("resumed", result) == result["whole"], f"BUCKETMOO_TEST_SEED={SEED}"


def test_without_our_state_orders_are_others(outcomes: list[list[Any]]) -> None:
    """So the test before could fail."""
    for result in results(outcomes, **FORGOTTEN):
        assert result["resumed"] != result["whole"]


@pytest.mark.parametrize("two_stages", [False, True], ids=["flat", "two stages"])
def test_others_end_when_a_rank_dies(two_stages: bool) -> None:
    """In the exchange of the second window's second bucket."""
    world_size = 4 if two_stages else 3
    outcomes = launch.launch("die_in_an_exchange.py", world_size, [two_stages], timeout=2 * TIME_LIMIT)
    assert outcomes[1].status == 3
    for rank in range(world_size):
        outcome = outcomes[rank]
        if rank == 1:
            continue
        assert outcome.status == 1, outcome.output[-2000:]
        assert outcome.result.startswith("RuntimeError: "), outcome.result
        assert outcome.seconds - outcomes[1].seconds < TIME_LIMIT
