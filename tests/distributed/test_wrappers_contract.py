"""DDP, FSDP1 and FSDP2: what cannot be right ends in an error on every rank, never in a hang or in a plain average; a
window that is not finite is dropped or kept; and what must make no difference makes none.

All scenarios run in one start of two processes; of those that are alike, in several ways to wrap, one is drawn in each
run, and the nightly list has all. What a message must name, the setting and the way out, stands in one table for each
kind: `REFUSED`, `ERRORS`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import launch
import pytest
import torch
from distributed.not_finite import check_not_finite
from draw import SEED, Case, pairwise
from torch.torch_version import TorchVersion

WRAPPERS = ("ddp", "fsdp1", "fsdp2")
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
FSDP1_WAYS = [
    {"strategy": strategy, "use_orig_params": orig_params}
    for strategy, orig_params in itertools.product(STRATEGIES, (True, False))
]
WAYS: dict[str, list[Case]] = {
    "ddp": [{"gradient_as_bucket_view": view} for view in (False, True)],
    "fsdp1": FSDP1_WAYS,
}

# What `register` says to models and settings that it does not take: it names itself, or the setting.
REFUSED: dict[str, dict[str, list[str]]] = {
    "ddp": {
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
    },
    "fsdp1": {
        "no_fsdp": ["ToyLM is no FullyShardedDataParallel module", "bucketmoo_ds.fsdp2"],
        "fsdp2": ["FSDPToyLM is no FullyShardedDataParallel module", "bucketmoo_ds.fsdp2"],
        "hybrid": ["HYBRID_SHARD", "a sum of combined ones", "2-D mesh and bucketmoo_ds.fsdp2"],
        "hybrid_zero2": ["_HYBRID_SHARD_ZERO2", "a sum of combined ones", "2-D mesh and bucketmoo_ds.fsdp2"],
        "hooked": ["communication hook already", "leave it out"],
        "twice": ["communication hook already", "leave it out"],
        "nothing_to_train": ["no unit of the model has a trainable parameter"],
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
    },
    "fsdp2": {
        "not_sharded": ["ToyLM is no FSDP2 module", "fully_shard"],
        "several_groups": ['module "" has several parameter groups', "fully_shard to a module for each mesh"],
        "custom_reduce_scatter": ['module "layers.1" is CustomReduceScatter', "and set_custom_reduce_scatter"],
        "own_memory": ['module "" is ProcessGroupAllocReduceScatter', "leave out set_symm_mem_for_comm"],
        "all_reduce_hook": ['module "layers.0" has an all-reduce hook', "2-D mesh instead"],
        "post_accumulate": ['"head.weight" has a post-accumulate-grad hook', "step after backward"],
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
        "two_stages_on_one_node": ['bucket_moo.exchange = "two_stage": 2 ranks with 2 a node', "ranks_per_node"],
        "streaming_over_layers": ['bucket_moo.mode = "streaming"', 'use "auto" or "deferred"'],
    },
}

OLDER = TorchVersion(torch.__version__) < "2.13"
if OLDER:  # whose own DDP fails with delayed parameters
    del REFUSED["fsdp2"]["several_groups"], REFUSED["ddp"]["delayed"]
if torch.version.cuda and not torch.cuda.is_available():  # its own DDP asks the driver for a stream
    del REFUSED["ddp"]["mixed_precision"]

DIFFERENCES = ("model", "frozen", "wrapping", "languages", "aggregator", "micro_steps", "once_a_window")
LAYOUTS = {
    "unfrozen": ['"layers.1.0.weight" was unfrozen', "do it before"],
    "frozen": ["between two micro-steps of a window", "do it after optimizer.step()"],
    "frozen in part": ["between two micro-steps of a window", "do it after optimizer.step()"],
    "added": ["2 parameters were added", "do it before"],
    "hook": ["post-accumulate-grad hook", "step after backward"],
    "reduce-scatter": ["the reduce-scatter was changed", "leave out"],
}
UNREDUCED = {"ddp": "no_sync()", "fsdp1": "no_sync()", "fsdp2": "set_requires_gradient_sync(False)"}

# (scenario, its arguments, the error's type, what the message says)
ERRORS: list[tuple[str, Case, str, list[str]]] = [
    # What one rank alone knows of is told to the others: they would wait in the exchange.
    *(
        ("unsynced", {"wrapper": wrapper, "ranks": ranks}, "LanguageError", [*where, how, "once_a_window=True"])
        for wrapper, how in UNREDUCED.items()
        for ranks, where in (([0, 1], ["rank 0: ", "rank 1: "]), ([1], ["rank 1: "]))
    ),
    *(
        (name, {"wrapper": wrapper} | arguments, kind, said)
        for wrapper in WRAPPERS
        for name, arguments, kind, said in (
            ("wrong_language", {"rank": 1}, "LanguageError", ['rank 1: language "es" is not in']),
            ("changed_language", {}, "LanguageError", ['from language "de" to "fr" within a window']),
            ("no_token_at_all", {}, "LanguageError", ["no language fed a target token"]),
            ("state_within_a_window", {}, "BucketMOOError", ["in the middle of a window", "at the boundary"]),
        )
    ),
    *(
        ("unsynced", {"wrapper": wrapper, "ranks": [0], "once_a_window": True}, "LanguageError", ["rank 0: ", how])
        for wrapper, how in list(UNREDUCED.items())[:2]
    ),
    *(
        ("step_within_a_window", {"wrapper": wrapper}, "BucketMOOError", ["optimizer.step() after 1 of 2"])
        for wrapper in ("ddp", "fsdp2")
    ),
    *(
        ("step_within_a_window", {"wrapper": "fsdp1", "strategy": strategy, "once_a_window": once}, *said)
        for said in [("BucketMOOError", ["optimizer.step() after 1 of 2"])]
        for strategy, once in itertools.product(STRATEGIES, (False, True))
    ),
    *(
        ("backward_after_the_boundary", {"wrapper": wrapper} | how, "BucketMOOError", ["optimizer.step()"])
        for wrapper, how in [
            ("ddp", {}),
            ("fsdp2", {}),
            *(
                ("fsdp1", how)
                for how in pairwise({"strategy": STRATEGIES, "use_orig_params": (False, True), "layers": (False, True)})
            ),
        ]
    ),
    # With other strategies FSDP1 itself has nothing to compute with, or asserts.
    *(
        ("two_forwards", {"wrapper": wrapper} | how, "LanguageError", ["before the next one"])
        for wrapper, how in (
            ("ddp", {}),
            ("fsdp1", {"strategy": "NO_SHARD", "use_orig_params": True}),
            ("fsdp1", {"strategy": "NO_SHARD", "use_orig_params": False}),
        )
    ),
    *(("closed", {"wrapper": wrapper}, "BucketMOOError", ["do not close"]) for wrapper in ("fsdp1", "fsdp2")),
    ("unfrozen", {"wrapper": "ddp"}, "BucketMOOError", ['"layers.1.0.weight" (6 in all)', "before wrapping"]),
    ("unfrozen", {"wrapper": "fsdp1"}, "BucketMOOError", ["frozen or unfrozen after fsdp1.register"]),
    # DDP alone.
    ("joined", {}, "LanguageError", ["join()", "LanguageBatchSampler"]),
    ("failing_hook", {}, "ValueError", ["the exchange failed"]),
    # FSDP1 alone.
    ("synced", {"rank": 1}, "LanguageError", ["rank 1: ", "with model.no_sync():"]),
    ("unregistered", {}, "BucketMOOError", ["model.register_comm_hook(session, hook)"]),
    ("unequal_units", {}, "DisagreementError", ['"layers.0.weight" got a gradient', "on rank(s) [0] only"]),
    ("recomputed_units", {}, "BucketMOOError", ["second gradient in one backward", "use_reentrant=False"]),
    ("left_behind", {}, "BucketMOOError", ["(1 in all)", "use all their units in the window's last one too"]),
    # FSDP2 alone.
    *(("ranks_differ", {"what": what}, "DisagreementError", ["run one script on all"]) for what in DIFFERENCES),
    *(
        ("changed_layout", {"what": what, "ranks": ranks}, "LanguageError", [f"rank {ranks[0]}: ", "rank 1: ", *said])
        for what, said in LAYOUTS.items()
        for ranks in ([0, 1], [1])
    ),
    *(
        ("unused_left_out", {}, "BucketMOOError", ["were there at register", f"leave out {setting}"])
        for setting in (() if OLDER else ("set_reduce_scatter_unused_params",))
    ),
    ("called_twice", {}, "BucketMOOError", ["bucket 0 (layers.2.0", "second gradient", "contains all its calls"]),
    ("not_the_root", {}, "LanguageError", ["a module inside of the model", "applied last"]),
]

NAN, INF = math.nan, math.inf
NOT_FINITE: list[Case] = [
    {"name": "not_finite", "wrapper": wrapper, "mode": mode, "micro_steps": micro_steps, "value": value} | more
    for wrapper, mode, micro_steps, value, more in (
        ("ddp", "streaming", 1, NAN, {"on_nonfinite": "drop"}),
        ("ddp", "deferred", 1, NAN, {"on_nonfinite": "drop", "how": {"gradient_as_bucket_view": True}}),
        ("ddp", "auto", 2, NAN, {"on_nonfinite": "drop", "how": {"gradient_as_bucket_view": True}}),
        ("ddp", "streaming", 1, NAN, {"on_nonfinite": "keep", "how": {"gradient_as_bucket_view": True}}),
        ("ddp", "auto", 2, INF, {"on_nonfinite": "keep"}),
        ("fsdp1", "streaming", 1, NAN, {"on_nonfinite": "drop", "how": FSDP1_WAYS[0]}),
        ("fsdp1", "deferred", 1, INF, {"on_nonfinite": "drop", "how": FSDP1_WAYS[4]}),
        ("fsdp1", "auto", 2, NAN, {"on_nonfinite": "drop", "how": FSDP1_WAYS[1]}),
        ("fsdp1", "auto", 2, NAN, {"on_nonfinite": "drop", "once_a_window": True, "how": FSDP1_WAYS[1]}),
        ("fsdp1", "auto", 2, NAN, {"on_nonfinite": "drop", "once_a_window": True, "how": FSDP1_WAYS[4]}),
        ("fsdp1", "streaming", 1, NAN, {"on_nonfinite": "keep", "how": FSDP1_WAYS[2]}),
        ("fsdp1", "auto", 2, NAN, {"on_nonfinite": "keep", "how": FSDP1_WAYS[5]}),
        ("fsdp1", "auto", 2, NAN, {"on_nonfinite": "keep", "once_a_window": True, "how": FSDP1_WAYS[0]}),
        ("fsdp2", "streaming", 1, NAN, {"on_nonfinite": "drop"}),
        ("fsdp2", "streaming", 1, INF, {"on_nonfinite": "drop", "where": "layers.1"}),
        ("fsdp2", "deferred", 1, NAN, {"on_nonfinite": "drop", "where": "layers.1"}),
        ("fsdp2", "auto", 2, INF, {"on_nonfinite": "drop"}),
        ("fsdp2", "streaming", 1, INF, {"on_nonfinite": "keep", "where": "layers.1"}),
        ("fsdp2", "auto", 2, NAN, {"on_nonfinite": "keep"}),
    )
]


def zeroing() -> list[Case]:
    """For each way to wrap, exchanged every micro-step and once a window: the plain way to reset, and another."""
    draw = random.Random(SEED)
    return [
        {
            "name": "zeroing",
            "wrapper": wrapper,
            "ways": ["none", draw.choice(("zeros", "never") if once else ("zeros", "never", "every micro-step"))],
            "once_a_window": once,
        }
        | how
        for wrapper, ways in WAYS.items()
        for how in ways
        for once in (False, True)
    ]


ZEROING = zeroing()
SAME_STEP: dict[str, list[Case]] = {
    wrapper: [{"name": name, "wrapper": wrapper} for name in ("plain_step", "evaluation_before_backward")]
    for wrapper in ("ddp", "fsdp1")
}
SAME_STEP["fsdp1"].append({"name": "by_pair"})
SAME_STEP["ddp"].append({"name": "hidden_output"})
EVENTS = [
    {"name": "order_of_events", "wrapper": wrapper, "mode": mode} | how
    for wrapper, how in (("ddp", {}), ("fsdp1", {"strategy": "FULL_SHARD"}), ("fsdp1", {"strategy": "NO_SHARD"}))
    for mode in ("streaming", "deferred")
]

# What one wrapper alone has.
UNUSED = [
    {"name": "gradients_of_unused", "adapters": adapters, "how": {"gradient_as_bucket_view": view}}
    for adapters in ([[0, 1]] * 2, [[0, 1], [0, 0]])
    for view in (False, True)
]
BUCKETS = [{"name": "buckets", "how": how} for how in ({}, {"static_graph": True}, {"find_unused_parameters": True})]
REENTRANT = [{"name": "recomputed_layer", "reentrant": reentrant} for reentrant in (False, True)]
MEMORY = [{"name": "memory", "width": width} for width in (16, 17)]
MIXED: Case = {"name": "mixed_parameters"}
PROPERTIES = [{"name": name} for name in ("bucket_views", "frozen_and_unfrozen_after_wrapping")]
BETWEEN = [{"name": "between_micro_steps"} | way for way in FSDP1_WAYS]
UNUSED_UNITS = [{"name": "unused"} | way for way in FSDP1_WAYS]
BLOCKS = [{"name": "block_names", "use_orig_params": orig_params} for orig_params in (True, False)]
SENT = [{"name": "sent", "strategy": strategy} for strategy in STRATEGIES]
# Against the order of the model, so that gradients come in the order in which they are not reduced; and one unit twice.
AGAINST_PLAIN = [
    {"name": "against_plain", "layers": layers, "strategy": strategy}
    for layers in ([1, 0], [0, 1, 0])
    for strategy in STRATEGIES
]
RESUMED: list[Case] = [
    {"name": "resumed", "seed": SEED, "micro_steps": micro_steps, "once_a_window": once_a_window}
    for micro_steps, once_a_window in ((1, False), (2, False), (2, True))
]
# Whether another order of conflicts gives other bits depends on the data: with this seed it does.
FORGOTTEN: Case = {"name": "resumed", "seed": 5, "micro_steps": 2, "forget": True}

SCENARIOS: list[Case] = [
    *({"name": "refused", "wrapper": wrapper, "case": case} for wrapper, cases in REFUSED.items() for case in cases),
    *({"name": name} | arguments for name, arguments, _, _ in ERRORS),
    *NOT_FINITE,
    *ZEROING,
    *itertools.chain(*SAME_STEP.values()),
    *EVENTS,
    *UNUSED,
    *BUCKETS,
    *MEMORY,
    MIXED,
    *REENTRANT,
    *PROPERTIES,
    *BETWEEN,
    *UNUSED_UNITS,
    *BLOCKS,
    *SENT,
    *AGAINST_PLAIN,
    *RESUMED,
    FORGOTTEN,
]
# Whose tests have one scenario each, of which a run draws some.
DRAWN: list[Case] = [
    *({"name": name} | arguments for name, arguments, _, _ in ERRORS),
    *NOT_FINITE,
    *ZEROING,
    *BETWEEN,
    *UNUSED_UNITS,
    *AGAINST_PLAIN,
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """Those scenarios run that no test of this run is alone to have and was not chosen."""
    tests = [item for item in request.session.items if item.path == request.path]
    there = [scenario_of(item.callspec.params) for item in tests if hasattr(item, "callspec")]
    wanted = [each for each in SCENARIOS if each not in DRAWN or each in there]
    outcomes = launch.run("wrappers_contract.py", 2, wanted, timeout=550)
    return lambda scenario: outcomes[wanted.index(scenario)]


def scenario_of(parameters: dict[str, Any]) -> Case | None:
    """What a test of one drawn scenario has as its parameters."""
    if "arguments" in parameters:
        return {"name": parameters["name"]} | parameters["arguments"]
    return parameters.get("case")


Results = Callable[[Case], list[Any]]  # of both ranks


def one_of(alike: Callable[..., object], cases: Iterable[Any]) -> list[Any]:
    """Returns parameters of a test: of the cases that are alike all but a drawn one are for the nightly list. A case of
    several parameters is a tuple."""
    groups: dict[object, list[Any]] = {}
    for case in cases:
        parameters = case if isinstance(case, tuple) else (case,)
        groups.setdefault(alike(*parameters), []).append(parameters)
    draw = random.Random(f"{SEED}/contract")
    found = []
    for group in groups.values():
        chosen = draw.randrange(len(group))
        marks = [() if index == chosen else pytest.mark.nightly for index in range(len(group))]
        found += [pytest.param(*parameters, marks=mark) for parameters, mark in zip(group, marks, strict=True)]
    return found


def wrapped_alike(case: Case) -> tuple[object, ...]:
    """Two ways to wrap that differ in one setting of the wrapper, or in when it exchanges."""
    return case["wrapper"], case.get("strategy"), case.get("gradient_as_bucket_view")


def not_finite_alike(case: Case) -> tuple[object, ...]:
    return case["wrapper"], case["on_nonfinite"], case["mode"] == "auto"


def errors_alike(name: str, arguments: Case, kind: str, said: list[str]) -> tuple[object, ...]:
    """What the session does is the same under all wrappers; what a wrapper has to do with is tried under each."""
    of_session = name in ("wrong_language", "changed_language", "no_token_at_all", "state_within_a_window")
    return name, None if of_session else arguments.get("wrapper"), arguments.get("what")


def strategies_alike(case: Case) -> object:
    return case["strategy"]


def name_of(case: Case) -> str:
    return "-".join(str(value) for name, value in case.items() if name != "name")


@pytest.mark.parametrize(("wrapper", "case"), [(wrapper, case) for wrapper, cases in REFUSED.items() for case in cases])
def test_refused_at_start_up(results: Results, wrapper: str, case: str) -> None:
    for result in results({"name": "refused", "wrapper": wrapper, "case": case}):
        assert result is not None, "it started"
        assert result["error"] == "ConfigError", result
        assert result["message"].startswith((f"{wrapper}.register: ", "bucket_moo."))
        for words in REFUSED[wrapper][case]:
            assert words in result["message"]


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "said"), one_of(errors_alike, ERRORS), ids=lambda value: str(value)[:60]
)
def test_error_on_every_rank(results: Results, name: str, arguments: Case, kind: str, said: list[str]) -> None:
    for result in results({"name": name} | arguments):
        assert result is not None, "no error"
        assert result["error"] == kind, result
        for words in said:
            assert words in result["message"]


@pytest.mark.parametrize("case", one_of(not_finite_alike, NOT_FINITE), ids=name_of)
def test_window_that_is_not_finite(results: Results, case: Case) -> None:
    found = results(case)
    check_not_finite(found, case)
    first, second = found
    assert second["log"] == ""
    buckets = {bucket for _, bucket in first["nonfinite"]}
    # The gradients of what comes after the poisoned layer are well.
    assert buckets == set(first["buckets"][1 if "where" in case else 0 :])
    for bucket in buckets:
        assert f"language fr in {bucket}" in first["log"]


@pytest.mark.parametrize("case", one_of(wrapped_alike, ZEROING), ids=name_of)
def test_how_gradients_are_reset_makes_no_difference(results: Results, case: Case) -> None:
    for ends in results(case):
        assert isinstance(ends, list), ends
        assert len(set(ends)) == 1, f"BUCKETMOO_TEST_SEED={SEED}"


@pytest.mark.parametrize("wrapper", SAME_STEP)
def test_other_ways_to_take_a_step(results: Results, wrapper: str) -> None:
    """A forward pass without gradients before backward; FSDP1's `comm_hook` with one's own `register_comm_hook`; an
    output of a type of one's own under DDP."""
    found = [result for scenario in SAME_STEP[wrapper] for result in results(scenario)]
    assert isinstance(found[0], str), found
    assert len(set(found)) == 1


@pytest.mark.parametrize("case", EVENTS, ids=name_of)
def test_exchange_goes_on_during_backward(results: Results, case: Case) -> None:
    """Rows are under way before the last gradient is there; while streaming, combined shards are too. The deferred tail
    is one exchange of Grams, and one of what was decided."""
    whole = case["wrapper"] == "ddp" or case["strategy"] == "NO_SHARD"
    for events in results(case):
        if case["mode"] == "deferred":
            assert events[: events.index("all_to_all_grams")].count("gradient") == events.count("gradient")
            assert (events.count("all_to_all_grams"), events.count("all_gather_grams")) == (1, 1)
            assert "scatter" in events[: events.index("gradient", events.index("scatter"))]
            continue
        early = events[: len(events) - 1 - events[::-1].index("gradient")]
        assert early.count("scatter") >= 2
        assert early.count("all_gather" if whole else "combined") >= 2
        if case["wrapper"] == "fsdp1":
            assert early.count("all_gather") == (early.count("combined") if whole else 0)


def test_process_groups_train_apart() -> None:
    cases = [{"name": "subgroups", "wrapper": wrapper} for wrapper in ("ddp", "fsdp1")]
    for found in launch.run("wrappers_contract.py", 4, cases):
        assert [result["world_size"] for result in found] == [2] * 4
        assert found[0] == found[2]
        assert found[1] == found[3]
        assert found[0] != found[1]


# --- DDP alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BUCKETS, ids=name_of)
def test_buckets_are_ddps_own_and_stay(results: Results, case: Case) -> None:
    """Though gradients come in another order, in the first backward and later."""
    for result in results(case):
        assert len(result["planned"]) > 1
        assert result["sizes"] == 4 * result["planned"]


def test_parameters_of_several_dtypes_and_memory_formats(results: Results) -> None:
    """Plain DDP adds up in bf16: two micro-steps of two ranks, three roundings of 2^-9 of a partial sum; we round the
    combined gradient, once."""
    for result in results(MIXED):
        assert result <= 4 * 2.0**-9


@pytest.mark.parametrize(("width", "kept"), [(16, True), (17, False)])
def test_buckets_are_sent_from_ddps_memory_and_gathered_into_it(results: Results, width: int, kept: bool) -> None:
    """Unless slices of whole eights do not fill them: 17 x 17 + 17 elements are no multiple of 16."""
    for used in results({"name": "memory", "width": width}):
        assert used == 2 * 2 * [kept], "two buckets"


def test_only_parameters_that_no_rank_used_have_no_gradient(results: Results) -> None:
    """As in plain DDP; between micro-steps nobody has, so that the next gradient is added to nothing. A window whose
    micro-steps use different parameters has them all."""
    for scenario in UNUSED:
        for between, boundary in results(scenario):
            assert set(between.values()) == {"none"}
            for name, gradient in boundary.items():
                assert gradient == ("none" if name.startswith("adapters.2.") else "some"), name


def test_reentrant_checkpoints_of_a_shared_layer(results: Results) -> None:
    plain, reentrant = (results(scenario) for scenario in REENTRANT)
    assert isinstance(plain[0], str), plain
    assert len({*plain, *reentrant}) == 1


@pytest.mark.parametrize("case", PROPERTIES, ids=lambda case: case["name"])
def test_property_holds(results: Results, case: Case) -> None:
    """See the scenario of that name."""
    assert results(case) == [True, True]


# --- FSDP1 alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", one_of(strategies_alike, BETWEEN), ids=name_of)
def test_gradients_are_zero_before_the_boundary(results: Results, case: Case) -> None:
    for first, second in results(case):
        assert first == 0
        assert second > 0


@pytest.mark.parametrize("case", one_of(strategies_alike, UNUSED_UNITS), ids=name_of)
def test_a_unit_that_no_rank_uses_has_no_gradient(results: Results, case: Case) -> None:
    """As in plain FSDP1: an optimizer with weight decay leaves it alone."""
    for result in results(case):
        assert result == {"gradients": [True, False], "changed": [True, False]}


@pytest.mark.parametrize("case", one_of(strategies_alike, AGAINST_PLAIN), ids=name_of)
def test_units_may_come_in_any_order(results: Results, case: Case) -> None:
    """One language, so that weights are 1 and the mean over two equal ranks rounds a few float32 (6e-8) sums."""
    for result in results(case):
        assert result <= 5e-7, result


@pytest.mark.parametrize("case", BLOCKS, ids=name_of)
def test_blocks_are_named_as_in_the_model_without_wrappers(results: Results, case: Case) -> None:
    for names, expected in results(case):
        assert names == expected


@pytest.mark.parametrize("case", SENT, ids=name_of)
def test_bytes_are_those_of_the_plain_reduction(results: Results, case: Case) -> None:
    """Sliced: its reduce-scatter's. Whole: a scatter and a gather of (W-1)/W N each, as its all-reduce sends, and at
    most 8 elements of alignment a unit and rank."""
    for result in results(case):
        if case["strategy"] != "NO_SHARD":
            assert result["all_to_all"] == result["reduce_scatter"]
            assert "all_gather (combined)" not in result
        else:
            assert result["all_to_all"] == result["all_gather (combined)"]
            assert 0 <= result["all_to_all"] - 4 * result["elements"] // 2 <= 4 * 8 * result["units"]


# --- FSDP2 alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: f"{case['micro_steps']}-{case['once_a_window']}")
def test_resumed_run_has_the_bits_of_one_that_went_on(results: Results, case: Case) -> None:
    for result in results(case):
        assert result.get("resumed", result) == result["whole"], f"BUCKETMOO_TEST_SEED={SEED}"


def test_without_our_state_orders_are_others(results: Results) -> None:
    """So the test before could fail."""
    for result in results(FORGOTTEN):
        assert result["resumed"] != result["whole"]


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


# --- processes that end -------------------------------------------------------------------------------------------

TIME_LIMIT = 60.0


@pytest.mark.parametrize("two_stages", [False, True], ids=["flat", "two stages"])
def test_others_end_when_a_rank_dies(two_stages: bool) -> None:
    """Under FSDP2, in the exchange of the second window's second bucket."""
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


def test_others_end_when_a_rank_fails_in_its_hook() -> None:
    """Under DDP."""
    outcomes = launch.launch("fail_in_a_hook.py", 2, None, timeout=2 * TIME_LIMIT)
    assert "the exchange failed on one rank" in outcomes[1].output
    for outcome in outcomes:
        assert outcome.status == 1, outcome.output[-2000:]
        assert outcome.result == "one window done"
        assert outcome.seconds < TIME_LIMIT
