"""FSDP1: gradients equal the float64 reference on 1 to 4 ranks; what cannot be right ends in an error on every rank.

The data and the model are drawn anew in every run, from a seed that every failure names and that the environment
variable `BUCKETMOO_TEST_SEED` sets.
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
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
WAYS = [
    {"strategy": strategy, "orig_params": orig_params} for orig_params in (True, False) for strategy in STRATEGIES
]

Case = dict[str, Any]
Key = tuple[int, str]


def grid(world_size: int) -> Iterator[tuple[str, Case]]:
    """Windows of 1 to 4 micro-steps, and fewer, as many and more languages than ranks; every strategy, with the
    original parameters and without. The other settings go round."""
    languages = sorted({max(world_size - 1, 1), world_size, world_size + 2})
    for index, (micro_steps, count) in enumerate(itertools.product((1, 2, 3, 4), languages)):
        yield f"M{micro_steps}-K{count}", WAYS[index % len(WAYS)] | {
            "micro_steps": micro_steps,
            "languages": count,
            "aggregator": AGGREGATORS[index % len(AGGREGATORS)],
            "granularity": GRANULARITIES[(index + index // 4) % len(GRANULARITIES)],
            "weighting": ("language", "token")[index // 2 % 2],
        }


def every_way(world_size: int) -> Iterator[tuple[str, Case]]:
    """What each strategy does on its own, with the original parameters and without: on two ranks all of it, on others
    each setting with one of the six, which take turns."""
    two: Case = {"micro_steps": 2, "languages": world_size + 1}
    bf16: Case = {"dtype": "bf16", "languages": 3, "micro_steps": 2}
    settings: dict[str, Case] = {
        "streaming": {"mode": "streaming", "languages": world_size},
        "deferred": {"mode": "deferred", "granularity": "parameter"},
        "clip": two | {"clip": 0.2},
        "tied": {"tied": True, "granularity": "layer"},
        "frozen_units": two | {"frozen": True},
        "unused": two | {"adapters": 2, "used_adapters": [0] * world_size},
        "once": {"micro_steps": 3, "once_a_window": True, "no_sync": True},
        "offload": two | {"offload": True},
        "one_unit": two | {"shard": {"together": True}, "granularity": "parameter"},
        "bf16": bf16,
        "bf16-streaming": bf16 | {"languages": world_size, "micro_steps": 1},
        "bf16-float32_wire": bf16 | {"shard": {"reduce_dtype": torch.float32}},
        "bf16-result": bf16 | {"shard": {"keep_low_precision_grads": True}},
    }
    for index, (name, case) in enumerate(settings.items()):
        for number, way in enumerate(WAYS):
            if world_size == 2 or number == (index + world_size) % len(WAYS):
                yield f"{name}-{way['strategy']}-{way['orig_params']}", way | case


def features(world_size: int) -> Iterator[tuple[str, Case]]:
    """Every other setting that changes the path of a gradient, by itself."""
    two = {"micro_steps": 2, "languages": 3}
    yield "plain", two | {"ragged": False}
    yield "no_target", two | {"empty": True, "granularity": "layer"}
    if world_size > 1:
        yield "no_target-streaming", {"empty": True, "languages": world_size}
    yield "frozen_in_a_unit", two | {"frozen": True, "tied": True, "shard": {"together": True}}
    yield "mixed_strategies", two | {"shard": {"whole": 2}, "clip": 0.2}
    yield "mixed_strategies-streaming", {"shard": {"whole": 2}, "languages": world_size}
    yield "reentrant", two | {"checkpoint": "reentrant"}
    yield "reentrant-grad_op", {"checkpoint": "reentrant", "strategy": "SHARD_GRAD_OP", "orig_params": False}
    yield "no_reentrant", two | {"checkpoint": "no_reentrant", "orig_params": False}
    yield "once-even", {"micro_steps": 3, "once_a_window": True, "no_sync": True, "ragged": False}
    yield "once-no_target", {"micro_steps": 3, "once_a_window": True, "no_sync": True, "empty": True}
    yield "dictionary", two | {"model": "dict"}
    yield "dictionary-once", {"model": "dict", "micro_steps": 2, "once_a_window": True, "no_sync": True}
    yield "dataclass", {"model": "dataclass"}
    yield "lora", two | {"model": "lora", "granularity": "parameter"}
    yield "small_parameters", two | {"model": "flat"}
    yield "bf16-once", {
        "dtype": "bf16",
        "micro_steps": 2,
        "once_a_window": True,
        "no_sync": True,
        "ragged": False,
        "aggregator": "mean",
        "languages": world_size,
    }
    yield "rows-host", two | {"row_storage": "host", "granularity": "layer"}
    yield "rows-bfloat16", two | {"row_storage": "bfloat16", "aggregator": "mean", "languages": 1}
    if world_size == 4:
        node = {"ranks_per_node": 2, "exchange": "two_stage", "table": [[0, 0, 1, 1]]}
        yield "nodes", node
        yield "nodes-whole", node | {"strategy": "NO_SHARD"}
        yield "nodes-deferred", node | {"micro_steps": 2, "table": [[0, 0, 1, 1], [1, 1, 2, 2]], "languages": 3}
        yield "nodes-once", node | {
            "micro_steps": 3,
            "table": [[0, 0, 1, 1]] * 3,
            "once_a_window": True,
            "no_sync": True,
            "ragged": False,
        }
        yield "nodes-mixed", {"ranks_per_node": 2, "table": [[0, 1, 2, 3]], "languages": 4}


def drawn(world_size: int) -> Iterator[tuple[str, Case]]:
    """Settings drawn anew in every run."""
    draw = random.Random(f"{SEED}/{world_size}")
    for index in range(4):
        yield f"drawn{index}", draw.choice(WAYS) | {
            "micro_steps": draw.choice((1, 2, 3)),
            "languages": draw.randint(1, world_size + 2),
            "clip": draw.choice((0.0, 0.4, 100.0)),
            "aggregator": draw.choice(AGGREGATORS),
            "granularity": draw.choice(GRANULARITIES),
            "weighting": draw.choice(("language", "token")),
            "checkpoint": draw.choice(("none", "reentrant", "no_reentrant")),
            "frozen": draw.random() < 0.3,
            "tied": draw.random() < 0.3,
            "empty": world_size > 1 and draw.random() < 0.3,
            "shard": {"whole": draw.randint(0, 3)},
        }


def cases_of(world_size: int) -> dict[str, Case]:
    """On 2 ranks all; on others nodes, and of the rest every second one, drawn anew in every run."""
    named = itertools.chain(*(source(world_size) for source in (grid, every_way, features, drawn)))
    return {
        name: case | {"wrapper": "fsdp1", "seed": SEED + index}
        for index, (name, case) in enumerate(named)
        if world_size == 2 or (index + world_size + SEED) % 2 or name.startswith("nodes")
    }


CASES = {world_size: cases_of(world_size) for world_size in WORLD_SIZES}
KEYS = [(world_size, name) for world_size in WORLD_SIZES for name in CASES[world_size]]


def tolerance(case: Case) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows.

    float32 (relative rounding 6e-8), as in test_reference_parity.py: 5e-7. A rank that adds up micro-steps of unequal
    token counts scales later outputs' gradients before they are propagated, where the reference scales what comes of
    them: a second source of the same size. bfloat16 that the model computes with is the input of both sides, and rows
    are float32. Rounded to bfloat16, by 2^-8 of it at most, are: the combined gradient with `keep_low_precision_grads`;
    and the sum of two micro-steps that a rank adds up, with an aggregator whose weights do not depend on it. bfloat16
    rows: the same with every micro-batch that is added, where sums so far are no longer than the row, about; the same
    aggregator.
    """
    if case.get("row_storage") == "bfloat16":
        return int(case["micro_steps"]) * case["world_size"] * 2.0**-8
    if case.get("dtype") == "bf16" and (
        case.get("once_a_window") or case.get("shard", {}).get("keep_low_precision_grads")
    ):
        return 2.0**-8 + 5e-7
    return 1e-6 if case.get("once_a_window") and case.get("ragged", True) else 5e-7


def name_of(key: Key) -> str:
    return f"W{key[0]}-{key[1]}"


def explain(key: Key) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {CASES[key[0]][key[1]]}"


class _Outcomes(dict[Key, list[dict[str, Any]]]):
    def __missing__(self, key: Key) -> list[dict[str, Any]]:
        world_size = key[0]
        cases = CASES[world_size]
        results = launch.run("wrapped.py", world_size, list(cases.values()), timeout=400)
        self.update({(world_size, name): result for name, result in zip(cases, results, strict=True)})
        return self[key]


@pytest.fixture(scope="module")
def outcomes() -> _Outcomes:
    """The results of all ranks of every case that has been asked for so far; starts each world size once."""
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    return _Outcomes()


every_case = pytest.mark.parametrize("key", KEYS, ids=name_of)


@every_case
def test_combined_gradient_is_the_reference(key: Key, outcomes: _Outcomes) -> None:
    case = CASES[key[0]][key[1]]
    for result in outcomes[key]:
        assert "error" not in result, f"{result}, {explain(key)}"
        assert result["gradient"] <= tolerance(case | {"world_size": key[0]}), f"{result}, {explain(key)}"
        one_exchange = case.get("micro_steps", 1) == 1 or case.get("once_a_window", False)
        if one_exchange and case.get("granularity", "bucket") == "bucket":
            assert result["streaming"] == (case.get("mode") != "deferred"), explain(key)


@every_case
def test_ranks_hold_the_same_bits(key: Key, outcomes: _Outcomes) -> None:
    for what in ("parameters", "decided"):
        assert len({result[what] for result in outcomes[key]}) == 1, explain(key)


def test_two_stages_keep_gradients_inside_a_node(outcomes: _Outcomes) -> None:
    for name in ("nodes", "nodes-whole", "nodes-deferred", "nodes-once"):
        for result in outcomes[4, name]:
            assert result["sent"]["all_to_all (nodes)"] > 0
            assert "all_to_all" not in result["sent"]


def test_second_run_and_other_ways_give_the_same_bits() -> None:
    """Twice the same; streaming and deferred; parameters gathered once or twice; checkpoints."""
    base = {"wrapper": "fsdp1", "seed": SEED, "languages": 2}
    two = base | {"micro_steps": 2}
    groups = [
        [base, base, base | {"mode": "deferred"}, base | {"strategy": "SHARD_GRAD_OP"}],
        [two, two, two | {"checkpoint": "no_reentrant"}, two | {"checkpoint": "reentrant"}, two | {"offload": True}],
    ]
    results = launch.run("wrapped.py", 2, [case for group in groups for case in group])
    for group in groups:
        found = [results.pop(0) for _ in group]
        assert len({result["parameters"] for ranks in found for result in ranks}) == 1, f"BUCKETMOO_TEST_SEED={SEED}"


# --- refusals, faults, and what must make no difference: all scenarios run in one start of two processes ------------

REFUSED = {
    "no_fsdp": ["ToyLM is no FullyShardedDataParallel module", "bucketmoo_ds.fsdp2"],
    "fsdp2": ["FSDPToyLM is no FullyShardedDataParallel module", "bucketmoo_ds.fsdp2"],
    "hybrid": ["HYBRID_SHARD", "a sum of combined ones", "2-D mesh and bucketmoo_ds.fsdp2"],
    "hybrid_zero2": ["_HYBRID_SHARD_ZERO2", "a sum of combined ones", "2-D mesh and bucketmoo_ds.fsdp2"],
    "hooked": ["communication hook already", "leave it out"],
    "twice": ["communication hook already", "leave it out"],
    "frozen": ["no unit of the model has a trainable parameter"],
    "groups": ["different process groups", "give all units the same"],
    "ignored": ['"head.weight"', "do not ignore it"],
    "ignored_flat": ['"head.weight"', "do not ignore it"],
    "added": ['"head.down"', "add adapters before wrapping"],
    "tied": ['"embed.weight"', "wrap tied weights in one unit"],
    "optimizer_in_backward": ["optimizer in backward", "step after backward"],
    "post_accumulate": ["post-accumulate-grad hook", "step after backward"],
    "post_accumulate_flat": ["post-accumulate-grad hook", "step after backward"],
    "tensor_parallel": ["tensor parallelism"],
    "other_torch": ["than 2.13.0", "'_is_padding_mask'", "bucketmoo_ds.fsdp2"],
}

# (scenario, its arguments, the error's type, what the message says)
ERRORS: list[tuple[str, Case, str, list[str]]] = [
    ("unsynced", {"ranks": [0, 1]}, "LanguageError", ["rank 0: ", "rank 1: ", "no_sync()", "once_a_window=True"]),
    ("unsynced", {"ranks": [1]}, "LanguageError", ["rank 1: ", "no_sync()", "once_a_window=True"]),
    ("unsynced", {"ranks": [0], "once_a_window": True}, "LanguageError", ["rank 0: ", "no_sync()"]),
    ("synced", {"rank": 1}, "LanguageError", ["rank 1: ", "with model.no_sync():"]),
    ("unregistered", {}, "BucketMOOError", ["model.register_comm_hook(session, hook)"]),
    ("unequal_units", {}, "DisagreementError", ['"layers.0.weight" got a gradient', "on rank(s) [0] only"]),
    ("recomputed", {}, "BucketMOOError", ["second gradient in one backward", "use_reentrant=False"]),
    ("wrong_language", {"rank": 1}, "LanguageError", ['rank 1: language "es" is not in']),
    ("changed_language", {}, "LanguageError", ['from language "de" to "fr" within a window']),
    ("closed", {}, "BucketMOOError", ["do not close the session"]),
    ("unfrozen", {}, "BucketMOOError", ["frozen or unfrozen after fsdp1.register"]),
    # With other strategies FSDP1 itself has nothing to compute with, or asserts, in these two.
    ("two_forwards", {"orig_params": True}, "BucketMOOError", ["(4 in all)", "before the next one"]),
    ("two_forwards", {"orig_params": False}, "BucketMOOError", ["(4 in all)", "before the next one"]),
    ("left_behind", {}, "BucketMOOError", ["(1 in all)", "use all their units in the window's last one too"]),
    *(
        ("step_within_a_window", {"strategy": strategy, "once_a_window": once}, "BucketMOOError", ["after 1 of 2"])
        for strategy in STRATEGIES
        for once in (False, True)
    ),
    *(
        (
            "backward_after_the_boundary",
            {"strategy": strategy, "use_orig_params": orig_params, "layers": layers},
            "BucketMOOError",
            ["call optimizer.step()"],
        )
        for strategy in STRATEGIES
        for orig_params in (False, True)
        for layers in (False, True)
    ),
]

NOT_FINITE: list[Case] = [
    {
        "name": "not_finite",
        "mode": mode,
        "micro_steps": micro_steps,
        "on_nonfinite": on_nonfinite,
        "once_a_window": once,
        "strategy": strategy,
        "use_orig_params": orig_params,
    }
    for mode, micro_steps, on_nonfinite, once, strategy, orig_params in (
        ("streaming", 1, "drop", False, "FULL_SHARD", True),
        ("deferred", 1, "drop", False, "NO_SHARD", True),
        ("auto", 2, "drop", False, "FULL_SHARD", False),
        ("auto", 2, "drop", True, "FULL_SHARD", False),
        ("auto", 2, "drop", True, "NO_SHARD", True),
        ("streaming", 1, "keep", False, "SHARD_GRAD_OP", True),
        ("auto", 2, "keep", False, "NO_SHARD", False),
        ("auto", 2, "keep", True, "FULL_SHARD", True),
    )
]
EVERY_WAY = [{"strategy": way["strategy"], "use_orig_params": way["orig_params"]} for way in WAYS]
ZEROING = [
    {"name": "zeroing", "how": how} | way for how in ("none", "zeros", "never", "every micro-step") for way in EVERY_WAY
]
ZEROING_ONCE = [
    {"name": "zeroing", "how": how, "once_a_window": True} | way
    for how in ("none", "zeros", "never")
    for way in EVERY_WAY
]
BETWEEN = [{"name": "between_micro_steps"} | way for way in EVERY_WAY]
UNUSED = [{"name": "unused"} | way for way in EVERY_WAY]
SAME_STEP = [{"name": name} for name in ("plain_step", "evaluation_before_backward", "by_pair")]
BLOCKS = [{"name": "block_names", "use_orig_params": orig_params} for orig_params in (True, False)]
EVENTS = [
    {"name": "order_of_events", "mode": mode, "strategy": strategy}
    for mode in ("streaming", "deferred")
    for strategy in ("FULL_SHARD", "NO_SHARD")
]
SENT = [{"name": "sent", "strategy": strategy} for strategy in STRATEGIES]

# Against the order of the model, so that gradients come in the order in which they are not reduced; and one unit twice.
AGAINST_PLAIN = [
    {"name": "against_plain", "layers": layers, "strategy": strategy}
    for layers in ([1, 0], [0, 1, 0])
    for strategy in STRATEGIES
]

SCENARIOS: list[Case] = [
    *({"name": "refused", "case": case} for case in REFUSED),
    *({"name": name} | arguments for name, arguments, _, _ in ERRORS),
    *NOT_FINITE,
    *ZEROING,
    *ZEROING_ONCE,
    *BETWEEN,
    *UNUSED,
    *SAME_STEP,
    *BLOCKS,
    *EVENTS,
    *SENT,
    *AGAINST_PLAIN,
]


@pytest.fixture(scope="module")
def scenarios() -> list[list[Any]]:
    return launch.run("fsdp1_scenarios.py", 2, SCENARIOS)


def results(scenarios: list[list[Any]], **scenario: Any) -> list[Any]:
    return scenarios[SCENARIOS.index(scenario)]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start_up(scenarios: list[list[Any]], case: str) -> None:
    for result in results(scenarios, name="refused", case=case):
        assert result is not None, "it started"
        assert result["error"] == "ConfigError", result
        for words in ("fsdp1.register: ", *REFUSED[case]):
            assert words in result["message"]


@pytest.mark.parametrize(("name", "arguments", "kind", "said"), ERRORS, ids=lambda value: str(value)[:60])
def test_error_on_every_rank(
    scenarios: list[list[Any]], name: str, arguments: Case, kind: str, said: list[str]
) -> None:
    for result in results(scenarios, name=name, **arguments):
        assert result is not None, "no error"
        assert result["error"] == kind, result
        for words in said:
            assert words in result["message"]


@pytest.mark.parametrize("case", NOT_FINITE, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_window_that_is_not_finite(scenarios: list[list[Any]], case: Case) -> None:
    first, second = results(scenarios, **case)
    for result in (first, second):
        assert "error" not in result, result
        assert result["skipped"]
        assert result["languages"] == ["fr"]
        assert result["dropped"] == result.get("unchanged", False) == (case["on_nonfinite"] == "drop")
        assert result["nan"] == (case["on_nonfinite"] == "keep")
        assert result["counters"] == {"windows": 3, "skipped_windows": 1, "nonfinite.fr": 1}
        assert not result["skipped_later"]
        assert result["goes_on"]
        assert result["finite"]
    assert first["parameters"] == second["parameters"]


@pytest.mark.parametrize("cases", [ZEROING, ZEROING_ONCE], ids=["every micro-step", "once a window"])
def test_how_gradients_are_reset_makes_no_difference(scenarios: list[list[Any]], cases: list[Case]) -> None:
    for number in range(len(EVERY_WAY)):
        found = [result for scenario in cases[number :: len(EVERY_WAY)] for result in results(scenarios, **scenario)]
        assert all(isinstance(result, str) for result in found), found
        assert len(set(found)) == 1, EVERY_WAY[number]


@pytest.mark.parametrize("case", BETWEEN, ids=lambda case: f"{case['strategy']}-{case['use_orig_params']}")
def test_gradients_are_zero_before_the_boundary(scenarios: list[list[Any]], case: Case) -> None:
    for first, second in results(scenarios, **case):
        assert first == 0
        assert second > 0


@pytest.mark.parametrize("case", UNUSED, ids=lambda case: f"{case['strategy']}-{case['use_orig_params']}")
def test_a_unit_that_no_rank_uses_has_no_gradient(scenarios: list[list[Any]], case: Case) -> None:
    """As in plain FSDP1: an optimizer with weight decay leaves it alone."""
    for result in results(scenarios, **case):
        assert result == {"gradients": [True, False], "changed": [True, False]}


def test_other_ways_to_take_a_step(scenarios: list[list[Any]]) -> None:
    """`comm_hook` with the user's own `register_comm_hook`; a forward pass without gradients before backward."""
    found = [result for scenario in SAME_STEP for result in results(scenarios, **scenario)]
    assert isinstance(found[0], str), found
    assert len(set(found)) == 1


@pytest.mark.parametrize("case", AGAINST_PLAIN, ids=lambda case: f"{case['layers']}-{case['strategy']}")
def test_units_may_come_in_any_order(scenarios: list[list[Any]], case: Case) -> None:
    """One language, so that weights are 1 and the mean over two equal ranks rounds a few float32 (6e-8) sums."""
    for result in results(scenarios, **case):
        assert result <= 5e-7, result


def test_blocks_are_named_as_in_the_model_without_wrappers(scenarios: list[list[Any]]) -> None:
    for scenario in BLOCKS:
        for names, expected in results(scenarios, **scenario):
            assert names == expected


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_exchange_goes_on_during_backward(scenarios: list[list[Any]], strategy: str) -> None:
    """Rows are under way before the last gradient is there; while streaming combined shards are too. The deferred tail
    is one all-reduce of Grams."""
    for events in results(scenarios, name="order_of_events", mode="streaming", strategy=strategy):
        last = len(events) - 1 - events[::-1].index("gradient")
        assert events[:last].count("scatter") >= 2
        assert events[:last].count("combined") >= 2
        assert events[:last].count("all_gather") == (events[:last].count("combined") if strategy == "NO_SHARD" else 0)
    for events in results(scenarios, name="order_of_events", mode="deferred", strategy=strategy):
        assert events[: events.index("all_reduce")].count("gradient") == events.count("gradient")
        assert events.count("all_reduce") == 1
        assert "scatter" in events[: events.index("gradient", events.index("scatter"))]


@pytest.mark.parametrize("case", SENT, ids=lambda case: str(case["strategy"]))
def test_bytes_are_those_of_the_plain_reduction(scenarios: list[list[Any]], case: Case) -> None:
    """Sliced: its reduce-scatter's. Whole: a scatter and a gather of (W-1)/W N each, as its all-reduce sends, and at
    most 8 elements of alignment a unit and rank."""
    for result in results(scenarios, **case):
        if case["strategy"] != "NO_SHARD":
            assert result["all_to_all"] == result["reduce_scatter"]
            assert "all_gather (combined)" not in result
        else:
            assert result["all_to_all"] == result["all_gather (combined)"]
            assert 0 <= result["all_to_all"] - 4 * result["elements"] // 2 <= 4 * 8 * result["units"]


def test_process_groups_train_apart() -> None:
    found = launch.run("fsdp1_scenarios.py", 4, [{"name": "subgroups"}])[0]
    assert [result["world_size"] for result in found] == [2] * 4
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0] != found[1]
