"""Trainer on several ranks with languages mixed in every batch, or one in each: under DDP and DeepSpeed, by the same
two lines."""

from __future__ import annotations

import random
from typing import Any

import launch
import pytest
import torch
from distributed.of_transformers import counted_otherwise_by_4, saves_no_last_by_4
from draw import SEED

LANGUAGES = ("de", "fr", "pl")
TYPES = {None: "DistributedDataParallel", 2: "DeepSpeedEngine", 3: "DeepSpeedEngine"}
RULES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "mean": {"aggregator": "mean", "weighting": "token"},
    "upgrad": {"aggregator": "upgrad", "granularity": "layer"},
}
PCGRAD = {"aggregator": "pcgrad", "granularity": "layer"}  # its random orders are in the checkpoint
CASES: dict[tuple[int | None, str], dict[str, Any]] = {
    **{(stage, rule): {"stage": stage, "moo": moo} for stage in TYPES for rule, moo in RULES.items()},
    **{(stage, "placed"): {"stage": stage, "moo": RULES["upgrad"], "mode": "placed"} for stage in TYPES},
    **{(stage, "resumed"): {"stage": stage, "moo": PCGRAD, "mode": "placed", "resumed": True} for stage in (None, 2)},
}
# SIGTERM to one rank: within a window, between it and its step, or before it.
_DRAW = random.Random(f"{SEED}/SIGTERM")
EVENT = _DRAW.choice(["on_substep_end", "on_pre_optimizer_step", "on_step_begin"])
ENDED = {"rank": _DRAW.randrange(2), "window": _DRAW.randrange(2), "event": EVENT}
if not saves_no_last_by_4.args[0]:
    MODE = _DRAW.choice(["placed", "mixed"])
    CASES |= {(stage, "ended"): {"stage": stage, "moo": PCGRAD, "mode": MODE, "ended": ENDED} for stage in (None, 2)}


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[int | None, str], list[Any]]:
    told = launch.run("mixed_trainer.py", 2, [case | {"seed": SEED} for case in CASES.values()])
    for results in told:
        for each in results:
            assert "error" not in each, each
    return dict(zip(CASES, told, strict=True))


def difference(found: Any, expected: Any) -> float:
    return float((found["parameters"] - expected["parameters"]).norm() / expected["parameters"].norm())


@counted_otherwise_by_4
@pytest.mark.parametrize("stage", TYPES)
def test_the_mean_by_token_is_plain_trainer(outcomes: dict[Any, Any], stage: int | None) -> None:
    """Three SGD steps in float32; a loss is divided before or after it is summed, to a few roundings of 6e-8."""
    for found, wanted in zip(outcomes[stage, "mean"], outcomes[stage, "plain"], strict=True):
        assert found["type"] == wanted["type"] == TYPES[stage]
        assert found["windows"] == 3
        assert difference(found, wanted) < 3e-7


@pytest.mark.parametrize("rule", ["upgrad", "placed"])
@pytest.mark.parametrize("stage", TYPES)
def test_a_rule_gives_the_same_under_all(outcomes: dict[Any, Any], stage: int | None, rule: str) -> None:
    """DDP is the measure: gradients are summed in another order, and the rule's weights answer to that a little."""
    for found, wanted in zip(outcomes[stage, rule], outcomes[None, rule], strict=True):
        assert found["windows"] == 3
        assert difference(found, wanted) < 3e-6
        logged, expected = (
            {name: each for name, each in result["log"].items() if name.startswith(("loss/", "tokens/", "moo/"))}
            for result in (found, wanted)
        )
        assert len([name for name in logged if name.startswith("loss/")]) == len(LANGUAGES)
        assert logged == pytest.approx(expected, rel=1e-4)  # losses in float32; weights answer to roundings
        assert difference(found, outcomes[stage, "mean"][0]) > 1e-4, "the rule should matter"


@pytest.mark.parametrize("stage", [None, 2])
def test_a_run_resumed_in_its_second_epoch_is_the_same_run(outcomes: dict[Any, Any], stage: int | None) -> None:
    for found in outcomes[stage, "resumed"]:
        assert found["epoch"] > 1
        assert found["again"]["windows"] == found["windows"] == 7
        assert torch.equal(found["again"]["parameters"], found["parameters"])
        assert torch.equal(found["again"]["weights"], found["weights"])


@saves_no_last_by_4
@pytest.mark.parametrize("stage", [None, 2])
def test_a_run_ended_by_sigterm_is_the_same_run(outcomes: dict[Any, Any], stage: int | None) -> None:
    """The window goes to its end, on both ranks, its step is saved, and the run that goes on reaches the same bits."""
    for found in outcomes[stage, "ended"]:
        assert found["step"] == ENDED["window"] + 1, ENDED
        assert found["saved"] == [f"checkpoint-{found['step']}"]
        assert not found["listens"]
        assert found["again"]["windows"] == found["windows"] == 3
        assert torch.equal(found["again"]["parameters"], found["parameters"]), ENDED
        assert torch.equal(found["again"]["weights"], found["weights"])
