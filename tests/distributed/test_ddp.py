"""DDP: gradients equal the float64 reference on 1 to 4 ranks, and what cannot be right ends in an error on every rank.

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

SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
WORLD_SIZES = (1, 2, 3, 4)
AGGREGATORS = ("mgda", "mean", "pcgrad", "cagrad", "upgrad")
GRANULARITIES = ("bucket", "parameter", "layer", "model")
# The toy model has about 3,100 elements: every parameter alone, several buckets, one bucket.
BUCKET_SIZES = (1, 700, 10**9)
TIME_LIMIT = 60.0

Case = dict[str, Any]
Key = tuple[int, str]


def grid(world_size: int) -> Iterator[tuple[str, Case]]:
    """Windows of 1 to 4 micro-steps, and fewer, as many and more languages than ranks. The other settings go round."""
    languages = sorted({max(world_size - 1, 1), world_size, world_size + 2})
    for index, (micro_steps, count) in enumerate(itertools.product((1, 2, 3, 4), languages)):
        yield f"M{micro_steps}-K{count}", {
            "micro_steps": micro_steps,
            "languages": count,
            "aggregator": AGGREGATORS[index % len(AGGREGATORS)],
            "granularity": GRANULARITIES[(index + index // 4) % len(GRANULARITIES)],
            "bucket_size": BUCKET_SIZES[index % len(BUCKET_SIZES)],
            "bucket_view": index % 2 == 0,
            "weighting": ("language", "token")[index // 2 % 2],
        }


def features(world_size: int) -> Iterator[tuple[str, Case]]:
    """Every setting that changes the path of a gradient, by itself."""
    two = {"micro_steps": 2, "languages": 3}
    once = {"micro_steps": 3, "languages": world_size, "once_a_window": True}
    yield "deferred", {"mode": "deferred"}
    yield "streaming-views", {"mode": "streaming", "bucket_view": True}
    yield "plain", two | {"ragged": False}
    yield "no_target", two | {"empty": True, "granularity": "layer"}
    yield "tied", two | {"tied": True, "bucket_view": True}
    yield "frozen", two | {"frozen": True, "granularity": "parameter"}
    yield "clip", two | {"clip": 0.5}
    yield "static_graph", two | {"static_graph": True}
    yield "static_graph-once", once | {"static_graph": True, "ragged": False}
    yield "reentrant", two | {"static_graph": True, "checkpoint": "reentrant"}
    yield "no_reentrant", two | {"checkpoint": "no_reentrant", "bucket_view": True}
    for view in (False, True):
        used = [rank % 2 for rank in range(world_size)]
        found = {"find_unused": True, "adapters": 3, "used_adapters": used, "bucket_view": view}
        yield f"unused-{view}", two | found | {"granularity": "parameter"}
        yield f"unused-streaming-{view}", found
        yield f"once-{view}", once | {"bucket_view": view, "ragged": False}
        yield f"once-no_sync-{view}", once | {"bucket_view": view, "no_sync": True, "ragged": False}
        yield f"once-no_sync-ragged-{view}", once | {"bucket_view": view, "no_sync": True, "empty": True}
        yield f"bf16-{view}", two | {"dtype": "bf16", "bucket_view": view}
    yield "bf16-streaming", {"dtype": "bf16"}
    yield "rows-host", two | {"row_storage": "host", "granularity": "layer"}
    yield "rows-bfloat16", two | {"row_storage": "bfloat16", "aggregator": "mean", "languages": 1}
    if world_size == 2:
        yield "compile", {"compile": True}
    if world_size == 4:
        node = {"ranks_per_node": 2, "exchange": "two_stage", "table": [[0, 0, 1, 1]]}
        yield "nodes", node
        yield "nodes-deferred", node | {"micro_steps": 2, "table": [[0, 0, 1, 1], [1, 1, 2, 2]], "languages": 3}
        yield "nodes-once", node | once | {"table": [[0, 0, 1, 1]] * 3, "languages": 2, "ragged": False}


def drawn(world_size: int) -> Iterator[tuple[str, Case]]:
    """Settings drawn anew in every run."""
    draw = random.Random(f"{SEED}/{world_size}")
    for index in range(4):
        yield f"drawn{index}", {
            "micro_steps": draw.choice((1, 2, 3)),
            "languages": draw.randint(1, world_size + 2),
            "bucket_size": draw.choice(BUCKET_SIZES),
            "bucket_view": draw.random() < 0.5,
            "find_unused": draw.random() < 0.3,
            "clip": draw.choice((0.0, 0.4, 100.0)),
            "aggregator": draw.choice(AGGREGATORS),
            "granularity": draw.choice(GRANULARITIES),
            "weighting": draw.choice(("language", "token")),
            "frozen": draw.random() < 0.3,
            "tied": draw.random() < 0.3,
            "empty": world_size > 1 and draw.random() < 0.3,
        }


def is_looked_at(name: str, world_size: int) -> bool:
    """By the tests of bytes and nodes."""
    return name in (f"M3-K{world_size}", "once-False") or name.startswith("nodes")


def cases_of(world_size: int) -> dict[str, Case]:
    """On 2 ranks all; on others what other tests look at, and of the rest every second one, drawn anew in every run."""
    named = itertools.chain(*(source(world_size) for source in (grid, features, drawn)))
    return {
        name: case | {"wrapper": "ddp", "seed": SEED + index}
        for index, (name, case) in enumerate(named)
        if world_size == 2 or (index + world_size + SEED) % 2 or is_looked_at(name, world_size)
    }


CASES = {world_size: cases_of(world_size) for world_size in WORLD_SIZES}
KEYS = [(world_size, name) for world_size in WORLD_SIZES for name in CASES[world_size]]


def tolerance(case: Case) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows.

    float32 (relative rounding 6e-8), as in test_reference_parity.py: 5e-7. Two kinds of cases differentiate otherwise
    than the reference does, a second source of the same size: compiled ones, and a rank that adds up micro-steps of
    unequal token counts, whose later outputs' gradients are scaled before they are propagated. bf16 parameters: the
    combined gradient is rounded once, 2^-9 of it; rows are float32. bf16 rows: each of the micro-batches of a row is
    added with a rounding of 2^-9 of the sum so far, which 2^-8 allows to be twice the row. With `mean`, whose weights
    do not depend on the rows; an aggregator that follows the rounded Grams is only as close as they make it.
    """
    if case.get("dtype") == "bf16":
        return 2.0**-9 + 5e-7
    if case.get("row_storage") == "bfloat16":
        return int(case["micro_steps"]) * case["world_size"] * 2.0**-8
    if case.get("compile") or (case.get("once_a_window") and case.get("ragged", True)):
        return 1e-6
    return 5e-7


def name_of(key: Key) -> str:
    return f"W{key[0]}-{key[1]}"


def explain(key: Key) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {CASES[key[0]][key[1]]}"


class _Outcomes(dict[Key, list[dict[str, Any]]]):
    def __missing__(self, key: Key) -> list[dict[str, Any]]:
        world_size = key[0]
        cases = CASES[world_size]
        results = launch.run("wrapped.py", world_size, list(cases.values()), timeout=300)
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


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_bytes(world_size: int, outcomes: _Outcomes) -> None:
    """A bucket of S W elements is scattered in every exchange and gathered once a window; nothing else is as large."""
    for name, exchanges in (("M3-K" + str(world_size), 3), ("once-False", 1)):
        for result in outcomes[world_size, name]:
            gathered = result["sent"]["all_gather (combined)"]
            assert gathered % (2 * (world_size - 1) * 8 * 4) == 0  # two windows of aligned float32 shards
            assert gathered >= 2 * 3100 * 4 * (world_size - 1) // world_size
            assert result["sent"]["all_to_all"] == exchanges * gathered, explain((world_size, name))


def test_two_stages_keep_gradients_inside_a_node(outcomes: _Outcomes) -> None:
    for name in ("nodes", "nodes-deferred", "nodes-once"):
        for result in outcomes[4, name]:
            assert result["sent"]["all_to_all (nodes)"] > 0
            assert "all_to_all" not in result["sent"]


def test_second_run_and_other_ways_give_the_same_bits(outcomes: _Outcomes) -> None:
    """Twice the same; streaming and deferred; `.grad` as a view; under `no_sync` or not."""
    base = {"wrapper": "ddp", "seed": SEED, "languages": 2}
    once = base | {"micro_steps": 3, "once_a_window": True}
    groups = [
        [base, base, base | {"mode": "deferred"}, base | {"bucket_view": True}, base | {"find_unused": True}],
        [once, once | {"no_sync": True}, once | {"no_sync": True, "bucket_view": True}, once | {"static_graph": True}],
    ]
    results = launch.run("wrapped.py", 2, [case for group in groups for case in group])
    for group in groups:
        found = [results.pop(0) for _ in group]
        assert len({result["parameters"] for ranks in found for result in ranks}) == 1, f"BUCKETMOO_TEST_SEED={SEED}"


def test_one_rank_is_one_process_alone() -> None:
    """DDP over one rank, and no DDP: the same blocks of the same rows, so the same bits."""
    base = {"seed": SEED, "languages": 3, "micro_steps": 3, "granularity": "layer"}
    ddp, single = launch.run("wrapped.py", 1, [base | {"wrapper": wrapper} for wrapper in ("ddp", "single")])
    assert ddp[0]["parameters"] == single[0]["parameters"], f"BUCKETMOO_TEST_SEED={SEED}"


# --- refusals, faults, and what must make no difference: all scenarios run in one start of two processes ------------

REFUSED = {
    "no_ddp": ["ToyLM is no DistributedDataParallel module", "bucketmoo_ds.single"],
    "hooked": ["communication hook already (noop_hook)"],
    "built_in_hook": ["communication hook already (BuiltinCommHookType.ALLREDUCE)"],
    "twice": ["communication hook already"],
    "optimizer_in_backward": ['"embed.weight"', "optimizer in backward", "step after backward"],
    "post_accumulate": ['"head.weight"', "post-accumulate-grad hook"],
    "mixed_precision": ["mixed_precision", "torch.autocast"],
    "python_reducer": ["python_reducer", "leave it out"],
    "ignored": ['"head.weight"', "_set_params_and_buffers_to_ignore_for_model"],
    "delayed": ['"head.weight"', "delay_all_reduce_named_params"],
    "sparse": ['"embed"', "sparse = True"],
    "tensor_parallel": ['"0.weight" is sharded', "tensor parallelism"],
    "no_bucket": ["bucket_size = 0"],
}

# (scenario, its arguments, the error's type, what the message says)
ERRORS: list[tuple[str, Case, str, list[str]]] = [
    ("unsynced", {"ranks": [0, 1]}, "LanguageError", ["rank 0: ", "rank 1: ", "no_sync()", "once_a_window=True"]),
    ("unsynced", {"ranks": [1]}, "LanguageError", ["rank 1: ", "no_sync()", "once_a_window=True"]),
    ("unsynced", {"ranks": [0], "once_a_window": True}, "LanguageError", ["rank 0: ", "no_sync()"]),
    ("two_forwards", {}, "BucketMOOError", ["(20 in all) took another way", "before the next one"]),
    ("wrong_language", {"rank": 1}, "LanguageError", ['rank 1: language "es" is not in']),
    ("changed_language", {}, "LanguageError", ['from language "de" to "fr" within a window']),
    ("step_within_a_window", {}, "BucketMOOError", ["optimizer.step() after 1 of 2 micro-steps"]),
    ("backward_after_the_boundary", {}, "BucketMOOError", ["call optimizer.step()"]),
    ("joined", {}, "LanguageError", ["join()", "LanguageBatchSampler"]),
    ("hidden_output", {}, "BucketMOOError", ["did not pass through the model's outputs"]),
    ("unfrozen", {}, "BucketMOOError", ['"layers.1.0.weight" (6 in all)', "before wrapping"]),
    ("failing_hook", {}, "ValueError", ["the exchange failed"]),
]

NOT_FINITE: list[Case] = [
    {"name": "not_finite", "mode": mode, "micro_steps": micro_steps, "on_nonfinite": on_nonfinite, "bucket_view": view}
    for mode, micro_steps, on_nonfinite, view in (
        ("streaming", 1, "drop", False),
        ("deferred", 1, "drop", True),
        ("auto", 2, "drop", True),
        ("streaming", 1, "keep", True),
        ("auto", 2, "keep", False),
    )
]

ZEROING = [
    {"name": "zeroing", "how": how, "bucket_view": view}
    for how in ("none", "zeros", "never", "every micro-step")
    for view in (False, True)
]
UNUSED = {"name": "gradients_of", "adapters": [0, 1]}
REBUILT = [{"name": "rebuilt_buckets", "cap": cap} for cap in (25.0, 2 / 1024)]

SCENARIOS: list[Case] = [
    *({"name": "refused", "case": case} for case in REFUSED),
    *({"name": name} | arguments for name, arguments, _, _ in ERRORS),
    *NOT_FINITE,
    *ZEROING,
    *REBUILT,
    UNUSED,
    *({"name": "recomputed", "reentrant": reentrant} for reentrant in (False, True)),
    *({"name": "order_of_events", "mode": mode} for mode in ("streaming", "deferred")),
    *(
        {"name": name}
        for name in ("plain_step", "evaluation_before_backward", "bucket_views", "frozen_after_wrapping")
    ),
]


@pytest.fixture(scope="module")
def scenarios() -> list[list[Any]]:
    return launch.run("ddp_scenarios.py", 2, SCENARIOS)


def results(scenarios: list[list[Any]], **scenario: Any) -> list[Any]:
    return scenarios[SCENARIOS.index(scenario)]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start_up(scenarios: list[list[Any]], case: str) -> None:
    for result in results(scenarios, name="refused", case=case):
        assert result is not None, "it started"
        assert result["error"] == "ConfigError", result
        for words in ("ddp.register: ", *REFUSED[case]):
            assert words in result["message"]


@pytest.mark.parametrize(("name", "arguments", "kind", "said"), ERRORS, ids=lambda value: str(value)[:40])
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


def test_buckets_that_ddp_rebuilds_make_no_difference(scenarios: list[list[Any]]) -> None:
    one, several = (results(scenarios, **scenario) for scenario in REBUILT)
    for ranks in (one, several):
        for result in ranks:
            first, *later = result["layouts"]
            assert len(later) == 3
            assert all(layout == later[0] != first for layout in later), "DDP did not rebuild"
    assert len(one[0]["layouts"][-1]) == 1 < len(several[0]["layouts"][-1])
    assert len({result["parameters"] for result in one + several}) == 1


def test_how_gradients_are_reset_makes_no_difference(scenarios: list[list[Any]]) -> None:
    found = [result for scenario in ZEROING for result in results(scenarios, **scenario)]
    assert all(isinstance(result, str) for result in found), found
    assert len(set(found)) == 1


def test_only_parameters_that_no_rank_used_have_no_gradient(scenarios: list[list[Any]]) -> None:
    """As in plain DDP; between micro-steps the others are zero, so that the next gradient is added to nothing."""
    for result in results(scenarios, **UNUSED):
        between, boundary = result
        for name, gradient in boundary.items():
            assert gradient == ("none" if name.startswith("adapters.2.") else "some"), name
            assert between[name] == ("none" if name.startswith("adapters.2.") else "zero"), name


def test_reentrant_checkpoints_of_a_shared_layer(scenarios: list[list[Any]]) -> None:
    plain, reentrant = (results(scenarios, name="recomputed", reentrant=reentrant) for reentrant in (False, True))
    assert isinstance(plain[0], str), plain
    assert len({*plain, *reentrant}) == 1


def test_forward_pass_without_gradients_before_backward(scenarios: list[list[Any]]) -> None:
    found = results(scenarios, name="plain_step") + results(scenarios, name="evaluation_before_backward")
    assert isinstance(found[0], str), found
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["bucket_views", "frozen_after_wrapping"])
def test_property_holds(scenarios: list[list[Any]], name: str) -> None:
    """See the scenario of that name."""
    assert results(scenarios, name=name) == [True, True]


def test_exchange_goes_on_during_backward(scenarios: list[list[Any]]) -> None:
    """Rows are under way before the last gradient is there; while streaming combined shards are too. The deferred tail
    is one all-reduce of Grams."""
    for events in results(scenarios, name="order_of_events", mode="streaming"):
        last = len(events) - 1 - events[::-1].index("gradient")
        assert events[:last].count("scatter") >= 2
        assert events[:last].count("all_gather") >= 2
    for events in results(scenarios, name="order_of_events", mode="deferred"):
        assert events[: events.index("all_reduce")].count("gradient") == events.count("gradient")
        assert events.count("all_reduce") == 1
        assert "scatter" in events[: events.index("gradient", events.index("scatter"))]


def test_others_end_when_a_rank_fails_in_its_hook() -> None:
    outcomes = launch.launch("fail_in_a_hook.py", 2, None, timeout=2 * TIME_LIMIT)
    assert "the exchange failed on one rank" in outcomes[1].output
    for outcome in outcomes:
        assert outcome.status == 1, outcome.output[-2000:]
        assert outcome.result == "one window done"
        assert outcome.seconds < TIME_LIMIT


def test_process_groups_train_apart() -> None:
    found = launch.run("ddp_scenarios.py", 4, [{"name": "subgroups"}])[0]
    assert [result["world_size"] for result in found] == [2] * 4
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0] != found[1]
