"""What must end in a skipped step or in an error on every rank: never in a hang, and never in a wrong gradient.

A run draws about half of the cases of each kind, of every stage and every error some; the nightly list has all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import launch
import pytest
from draw import some

WORLD_SIZE = 2
TIME_LIMIT = 60.0

STAGES = (0, 1, 2, 3)

NOT_FINITE: list[dict[str, Any]] = [
    {
        "name": "not_finite",
        "stage": stage,
        "dtype": dtype,
        "mode": mode,
        "micro_steps": micro_steps,
        "value": value,
        "where": where,
        "offload": offload,
    }
    for stage, dtype, mode, micro_steps, value, where, offload in (
        (0, "fp32", "auto", 1, math.nan, "layers.1.0.weight", False),
        (0, "bf16", "auto", 2, math.inf, None, False),
        (1, "fp32", "auto", 1, math.nan, None, False),
        (1, "fp32", "auto", 2, math.nan, "layers.1.0.weight", True),
        (1, "bf16", "deferred", 1, math.inf, None, False),
        (2, "fp32", "auto", 1, math.nan, "layers.1.0.weight", False),
        (2, "fp32", "deferred", 1, math.inf, "embed.weight", True),
        (2, "bf16", "auto", 1, math.nan, "head.weight", False),
        (2, "bf16", "auto", 3, math.nan, None, False),
        (3, "fp32", "auto", 1, math.nan, "layers.1.0.weight", False),
        (3, "fp32", "auto", 2, math.inf, "embed.weight", True),
        (3, "bf16", "auto", 1, math.nan, None, True),
        (3, "bf16", "deferred", 1, math.nan, "head.weight", False),
    )
]

# A language's first overflow lowers the scale, or, where DeepSpeed is told to let one pass, its second.
OVERFLOWS: list[dict[str, Any]] = [
    {"name": "overflow", "stage": stage, "micro_steps": micro_steps, "offload": offload, "hysteresis": hysteresis}
    for stage, micro_steps, offload, hysteresis in (
        (1, 1, False, 1),
        (1, 2, True, 1),
        (2, 1, True, 1),
        (2, 2, False, 1),
        (2, 1, False, 2),
        (3, 1, False, 1),
        (3, 2, True, 1),
        (3, 1, False, 2),
    )
]

# (scenario, its arguments, the error's type, what the message says)
ERRORS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    *(
        (
            "adapters_of_ranks",
            {"stage": stage, "adapters": adapters, "micro_steps": micro_steps},
            "DisagreementError",
            ['"adapters.0.', "rank(s) [0] only"],
        )
        for stage, micro_steps in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2))
        # Two parameters of the same size: their sum would be a gradient of neither, and no shape tells. With [0, None],
        # ZeRO-3 hangs in the gathering of parameters, with or without bucket_moo.
        for adapters in ([[0, 1]] if stage == 3 else [[0, None], [0, 1]])
    ),
    *(
        (name, {"stage": stage}, kind, said)
        for stage in STAGES
        for name, kind, said in (
            ("step_without_backward", "BucketMOOError", ["without a resolved window", "engine.backward"]),
            ("module_behind_the_engine", "LanguageError", ["(the engine), not a module inside of it"]),
            ("gradient_from_elsewhere", "BucketMOOError", ["without a resolved window", "engine.backward"]),
            ("backward_after_the_boundary", "BucketMOOError", ["call engine.step() first"]),
            ("coalesced", "BucketMOOError", ["coalesce_grad_reduction", "gradient_accumulation_steps"]),
        )
    ),
    *(
        (
            "second_gradient",
            {"stage": stage, "reentrant": True, "bucket_size": 1},
            "BucketMOOError",
            ['"shared.', "second gradient", "use_reentrant=False"],
        )
        for stage in STAGES
    ),
]


def some_of_each(cases: Sequence[Any], kind: Callable[[Any], Any]) -> list[Any]:
    """Returns test parameters: of each kind half of the cases, rounded up, and the others for the nightly list."""
    kinds = {kind(case): [each for each in cases if kind(each) == kind(case)] for case in cases}
    tuples = [[each if isinstance(each, tuple) else (each,) for each in of_kind] for of_kind in kinds.values()]
    return [parameter for of_kind in tuples for parameter in some(of_kind, -(-len(of_kind) // 2))]


SOME_NOT_FINITE = some_of_each(NOT_FINITE, lambda case: case["stage"])
SOME_OVERFLOWS = some_of_each(OVERFLOWS, lambda case: case["stage"])
SOME_ERRORS = some_of_each(ERRORS, lambda error: error[0])
SOME_STAGES = some_of_each(STAGES, lambda stage: 0)

OF_STAGES: list[dict[str, Any]] = [
    *({"name": "adapter_used_on_all", "stage": stage} for stage in STAGES),
    *({"name": "given_up", "stage": stage} for stage in STAGES),
    *(
        {"name": "second_gradient", "stage": stage, "reentrant": reentrant, "bucket_size": 10**9}
        for stage, reentrant in itertools.product(STAGES, (False, True))
    ),
]
CASES: list[dict[str, Any]] = [
    *NOT_FINITE,
    *OVERFLOWS,
    *({"name": name, **arguments} for name, arguments, _, _ in ERRORS),
    *OF_STAGES,
    {"name": "leaf_modules"},
]


Outcomes = list[tuple[dict[str, Any], list[Any]]]  # cases, with what came of them on all ranks


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """Of the cases that the tests of this run ask for."""
    asked: list[dict[str, Any]] = [{"name": "leaf_modules"}]
    for item in request.session.items:
        given = item.callspec.params if item.path == request.path and hasattr(item, "callspec") else {}
        asked += [given["case"]] if "case" in given else []
        asked += [{"name": given["name"], **given["arguments"]}] if "arguments" in given else []
        asked += [case for case in OF_STAGES if case["stage"] == given.get("stage")]
    cases = [case for case in CASES if case in asked]
    return list(zip(cases, launch.run("fault_scenarios.py", WORLD_SIZE, cases), strict=True))


def results(outcomes: Outcomes, **case: Any) -> list[Any]:
    return next(found for ran, found in outcomes if ran == case)


@pytest.mark.parametrize("case", SOME_NOT_FINITE, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_window_that_is_not_finite_is_skipped(outcomes: Outcomes, case: dict[str, Any]) -> None:
    first, second = results(outcomes, **case)
    for result in (first, second):
        assert result.get("unchanged") is True, result
        assert result["skipped_steps"] == 1
        assert {language for language, _ in result["nonfinite"]} == {"fr"}
        assert result["counters"] == {"windows": 4, "skipped_windows": 1, "nonfinite.fr": 1}
        assert result["goes_on"]
        assert result["finite"]
        assert result["nonfinite_later"] == ()
    assert first["parameters"] == second["parameters"]
    buckets = {bucket for _, bucket in first["nonfinite"]}
    if case["where"] is None:
        assert buckets == set(first["buckets"])
    else:
        assert len(buckets) == 1 < len(first["buckets"])
    for bucket in buckets:
        assert f"language fr in {bucket}" in first["log"]
    assert "language de" not in first["log"]
    assert second["log"] == ""


@pytest.mark.parametrize("case", SOME_OVERFLOWS, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_overflow_lowers_the_scale_once(outcomes: Outcomes, case: dict[str, Any]) -> None:
    lowered = 128.0 if case["hysteresis"] == 1 else 256.0
    first, second = results(outcomes, **case)
    for result in (first, second):
        assert result.get("skipped_steps") == 1, result
        assert result["scales"] == [256.0, lowered, lowered, lowered]
        assert result["nonfinite"] == [set(), {"fr"}, set(), set()]
        assert result["counters"] == {"windows": 4, "skipped_windows": 1, "nonfinite.fr": 1}
        assert result["finite"]
        before, skipped, *later = result["bits"]
        assert skipped == before
        assert len({before, *later}) == 3, "training goes on"
    assert first["parameters"] == second["parameters"]


@pytest.mark.parametrize(("name", "arguments", "kind", "said"), SOME_ERRORS, ids=lambda value: str(value)[:70])
def test_error_on_every_rank(
    outcomes: Outcomes, name: str, arguments: dict[str, Any], kind: str, said: list[str]
) -> None:
    for result in results(outcomes, name=name, **arguments):
        assert isinstance(result, dict), f"no error: {result}"
        assert result["error"] == kind, result
        for words in said:
            assert words in result["message"]


@pytest.mark.parametrize("stage", SOME_STAGES)
def test_parameters_that_all_ranks_leave_out_are_no_disagreement(outcomes: Outcomes, stage: int) -> None:
    assert results(outcomes, name="adapter_used_on_all", stage=stage) == [True, True]


@pytest.mark.parametrize("stage", SOME_STAGES)
def test_zero_grad_gives_a_resolved_window_up(outcomes: Outcomes, stage: int) -> None:
    for result in results(outcomes, name="given_up", stage=stage):
        assert result == {"windows": 3, "same": True}


def test_leaf_module_whose_forward_is_not_called(outcomes: Outcomes) -> None:
    """No hook of DeepSpeed's brings its gradients, which plain ZeRO-3 leaves unreduced. Its weights are then those of a
    model without leaf modules, to the bit."""
    for result in results(outcomes, name="leaf_modules"):
        assert result is True, result


@pytest.mark.parametrize("stage", SOME_STAGES)
def test_second_gradient_is_added_while_its_bucket_is_here(outcomes: Outcomes, stage: int) -> None:
    plain, reentrant = (
        results(outcomes, name="second_gradient", stage=stage, reentrant=reentrant, bucket_size=10**9)
        for reentrant in (False, True)
    )
    assert isinstance(plain[0], str), plain
    assert len(set(plain)) == 1
    assert reentrant == plain


def test_others_end_when_a_rank_dies() -> None:
    """All of the others. (Moments and stages: test_kills.py.)"""
    outcomes = launch.launch("die_in_a_window.py", 3, [2], timeout=2 * TIME_LIMIT)
    assert outcomes[1].status == 3
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.status == 1, outcome.output[-2000:]
        assert outcome.result not in ("one window done", "went on without rank 1")
        assert outcome.seconds - outcomes[1].seconds < TIME_LIMIT
