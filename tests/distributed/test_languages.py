"""The language of a micro-batch: every way to say it, and errors on every rank, in time, where one says it wrongly."""

from __future__ import annotations

from typing import Any

import launch
import pytest

WORLD_SIZE = 3
STAGES = (0, 1, 2, 3)
WAYS = (
    "name",
    "index",
    "names",
    "tensor",
    "scalar tensor",
    "context",
    "positional dictionary",
    "context around positional",
)

# (scenario, its arguments, the error's type, what the message says)
ERRORS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    *(
        ("one_rank_says", {"stage": stage, "entries": entries}, "LanguageError", ["rank 2: ", *said])
        for stage in STAGES
        for entries, said in (
            ({"language": ["de", "fr", "de"]}, ["several languages (de, fr)", "one language"]),
            ({"language": "dee"}, ['language "dee" is not in bucket_moo.languages', 'did you mean "de"?']),
            ({"language": 3}, ["language 3", "index from 0 to 2"]),
            ({}, ["names no language", '"language"', 'engine.language("de")']),
            ({"language": "de", "target_tokens": -1}, ["target_tokens = -1", "0 or more"]),
        )
    ),
    ("language_changes_in_a_window", {}, "LanguageError", ['mode = "streaming"', "keep one language", 'or use "auto"']),
    *(
        (name, {"stage": stage}, kind, said)
        for stage in STAGES
        for name, kind, said in (
            ("two_languages_in_one_backward", "LanguageError", ["rank 0", "rank 2", "(de, fr)"]),
            ("other_boundary", "DisagreementError", ["boundary", "rank 0: 1, rank 1: 0, rank 2: 0"]),
            ("no_target_anywhere", "LanguageError", ["no language fed a target token"]),
        )
    ),
    ("other_position", {}, "DisagreementError", ["boundary", "rank 0: 0, rank 1: 1, rank 2: 1"]),
    *(
        ("other_settings", {"key": key, "values": values}, "DisagreementError", ["settings or blocks", "rank 0"])
        for key, values in (
            ("seed", [1, 2, 2]),
            ("aggregator", ["mgda", "mgda", "mean"]),
            ("granularity", ["bucket", "layer", "bucket"]),
            ("languages", [["de", "fr", "pl"], ["de", "pl", "fr"], ["de", "fr", "pl"]]),
        )
    ),
]

CASES: list[dict[str, Any]] = [
    *({"name": name, **arguments} for name, arguments, _, _ in ERRORS),
    *({"name": "said_in_some_way", "stage": stage, "way": way} for stage in STAGES for way in WAYS),
    *(
        {"name": "with_evaluation", "stage": stage, "micro_steps": 2, "evaluate": evaluate}
        for stage in STAGES
        for evaluate in (False, True)
    ),
    *({"name": "absent", "stage": stage} for stage in STAGES),
    {"name": "start_line"},
]


@pytest.fixture(scope="module")
def outcomes() -> list[list[Any]]:
    """The results of all cases, on all ranks. A hang would end with gloo's time limit and then the launcher's."""
    return launch.run("language_scenarios.py", WORLD_SIZE, CASES)


def results(outcomes: list[list[Any]], **case: Any) -> list[Any]:
    return outcomes[CASES.index(case)]


@pytest.mark.parametrize(("name", "arguments", "kind", "said"), ERRORS, ids=lambda value: str(value)[:60])
def test_error_on_every_rank(
    outcomes: list[list[Any]], name: str, arguments: dict[str, Any], kind: str, said: list[str]
) -> None:
    for result in results(outcomes, name=name, **arguments):
        assert isinstance(result, dict), f"no error: {result}"
        assert result["error"] == kind, result
        for words in said:
            assert words in result["message"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_to_say_it_trains_alike(outcomes: list[list[Any]], stage: int, way: str) -> None:
    expected = results(outcomes, name="said_in_some_way", stage=stage, way=WAYS[0])
    assert len(set(expected)) == 1
    assert results(outcomes, name="said_in_some_way", stage=stage, way=way) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_does_not_disturb(outcomes: list[list[Any]], stage: int) -> None:
    plain, disturbed = (
        results(outcomes, name="with_evaluation", stage=stage, micro_steps=2, evaluate=evaluate)
        for evaluate in (False, True)
    )
    assert len(set(plain)) == 1
    assert disturbed == plain


@pytest.mark.parametrize("stage", STAGES)
def test_absent_language_is_masked(outcomes: list[list[Any]], stage: int) -> None:
    """ "pl" has no micro-batch; one of the two of "fr" has no target, and its loss is 0 / 0."""
    for result in results(outcomes, name="absent", stage=stage):
        assert result["present"] == (0, 1)
        assert result["target_tokens"] == (33, 33, 0)
        assert (result["weights"][:, 2] == 0).all()
        assert (result["gram"][:, 2] == 0).all()
        assert (result["weights"][:, :2].sum(dim=1) - 1).abs().max() < 1e-9  # MGDA's weights are convex
        assert (result["gram"].diagonal(dim1=1, dim2=2)[:, :2] > 0).all()
        assert result["finite"]


def test_start_line_says_what_runs(outcomes: list[list[Any]]) -> None:
    first, *others = results(outcomes, name="start_line")
    (line,) = [line for line in first.splitlines() if "bucket_moo: aggregator" in line]
    for words in ("upgrad", "layer", "de, fr, pl", "world size 3", "deferred", "all-to-all", "backend"):
        assert words in line
    assert not [text for text in others if "bucket_moo: aggregator" in text]
