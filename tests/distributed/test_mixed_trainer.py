"""Trainer on several ranks with languages mixed in every batch, or one in each: under DDP, FSDP and DeepSpeed, by the
same two lines; trained again, evaluated, resumed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from distributed.of_transformers import counted_otherwise_by_4, saves_no_last_by_4
from draw import SEED, Case, Key, some
from outcomes import Outcomes

LANGUAGES = ("de", "fr", "pl")
TYPES = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPLlamaForCausalLM",
    "fsdp1": "FullyShardedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
UPGRAD = {"aggregator": "upgrad", "granularity": "layer"}
GRADVAC = {"aggregator": "gradvac", "granularity": "layer", "weight_smoothing": 0.5}  # orders and a state to keep
RULES: dict[str, dict[str, Any]] = {
    "mean": {"moo": {"aggregator": "mean", "weighting": "token"}},
    "mixed": {"moo": UPGRAD},
    "placed": {"moo": UPGRAD, "mode": "placed"},
}
WINDOW = {"moo": UPGRAD, "mode": "placed", "languages": 2}
CASES: dict[Key, Case] = {
    (2, "ddp plain"): {"wrapper": "ddp", "moo": None},
    **{(2, f"{wrapper} {rule}"): {"wrapper": wrapper, **how} for wrapper in TYPES for rule, how in RULES.items()},
    (2, "ddp dispatched"): {
        "wrapper": "ddp", **RULES["placed"],
        "accelerator_config": {"use_configured_state": True, "dispatch_batches": True},
    },
    (2, "ddp window"): {"wrapper": "ddp", **WINDOW, "sampler": {"affinity": "window"}},
    (2, "zero1 window"): {"wrapper": "zero1", **WINDOW},
    (2, "zero1 told"): {"wrapper": "zero1", **WINDOW, "sampler": {"affinity": "micro_step"}},
    **{
        (2, f"{wrapper} {mode} resumed"): {
            "what": "resumed", "wrapper": wrapper, "moo": GRADVAC, "mode": mode, "sharded": mode == "mixed"
        }
        for wrapper in ("ddp", "zero2", "fsdp2") for mode in ("placed", "mixed")
    },
}  # fmt: skip
# SIGTERM to one rank: within a window, between it and its step, or before it.
_DRAW = random.Random(f"{SEED}/SIGTERM")
EVENT = _DRAW.choice(["on_substep_end", "on_pre_optimizer_step", "on_step_begin"])
BY = {"rank": _DRAW.randrange(2), "window": _DRAW.randrange(2), "event": EVENT}
ENDED = [(2, f"{wrapper} ended") for wrapper in ("ddp", "zero2", "fsdp2")]
MODE = _DRAW.choice(["placed", "mixed"])
HOW = {"what": "ended", "moo": GRADVAC, "mode": MODE, "by": BY, "sharded": True}  # torch cannot load SGD's whole state
CASES |= {key: {"wrapper": key[1].split()[0], **HOW} for key in ENDED}
CASES = {key: case | {"seed": SEED} for key, case in CASES.items()}
MEASURE = [key for key in CASES if key[1] in ("ddp plain", *(f"ddp {rule}" for rule in RULES))]
COMPARED = [(2, f"{wrapper} {rule}") for wrapper in TYPES if wrapper != "ddp" for rule in RULES]
COMPARED.append((2, "ddp dispatched"))  # the first rank reads for all
RESUMED = [key for key in CASES if key[1].endswith("resumed")]
ZERO1 = [key for key in CASES if key[1].startswith("zero1")]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return Outcomes(request, "mixed_trainer.py", CASES, also=[*MEASURE, (2, "ddp window")])


def ranks(outcomes: Outcomes, key: Key) -> list[Any]:
    for each in outcomes[key]:
        assert "error" not in each, (each, outcomes.explain(key))
    return outcomes[key]


def difference(found: Any, expected: Any) -> float:
    return float((found["parameters"] - expected["parameters"]).norm() / expected["parameters"].norm())


@counted_otherwise_by_4
def test_the_mean_by_token_is_plain_trainer(outcomes: Outcomes) -> None:
    """Three SGD steps in float32, and three more of a second `train()`, to a few roundings of 6e-8: a loss is divided
    before or after it is summed. The one is evaluated before, which changes nothing."""
    for found, wanted in zip(ranks(outcomes, (2, "ddp mean")), ranks(outcomes, (2, "ddp plain")), strict=True):
        assert difference(found, wanted) < 3e-7
        assert difference(found["again"], wanted["again"]) < 6e-7
        assert difference(wanted["again"], wanted) > 1e-3
        assert found["hooks"] == found["again"]["hooks"] == wanted["hooks"]


@pytest.mark.parametrize("key", some([(key,) for key in COMPARED], 6))
def test_a_rule_gives_the_same_under_all(outcomes: Outcomes, key: Key) -> None:
    """DDP is the measure: gradients are summed in another order, and the rule's weights answer to that a little."""
    wrapper, rule = key[1].replace("dispatched", "placed").split()
    mean = ranks(outcomes, (2, "ddp mean"))[0]
    for found, wanted in zip(ranks(outcomes, key), ranks(outcomes, (2, f"ddp {rule}")), strict=True):
        again = found["again"]
        assert TYPES[wrapper] in (found["type"], found["type"].replace("BucketMOOEngine", "DeepSpeedEngine"))
        assert found["windows"] == 3
        assert difference(found, wanted) < (3e-7 if rule == "mean" else 3e-6)
        logged, expected = (
            {name: each for name, each in result["log"].items() if name.startswith(("loss/", "tokens/", "moo/"))}
            for result in (found, wanted)
        )
        assert len([name for name in logged if name.startswith("loss/")]) == len(LANGUAGES)
        assert logged == pytest.approx(expected, rel=1e-4)  # losses in float32; weights answer to roundings
        assert rule == "mean" or difference(found, mean) > 1e-4, "the rule should matter"
        if wrapper in ("ddp", "fsdp2"):
            assert again["windows"] == 3
            assert difference(again, wanted["again"]) < 1e-5  # the weights of the first run, and its differences
            assert again["hooks"] == found["hooks"]
            assert found["evaluated"] == pytest.approx(wanted["evaluated"], rel=1e-5)
        else:  # evaluated after the first run
            assert "train() again" in again
            assert found["evaluated"].keys() == wanted["evaluated"].keys()


@pytest.mark.parametrize("key", some([(key,) for key in ZERO1], 1))
def test_zero1_keeps_a_language_for_the_window(outcomes: Outcomes, key: Key) -> None:
    """Unless it is told otherwise."""
    measure = ranks(outcomes, (2, "ddp window"))
    for found, wanted in zip(ranks(outcomes, key), measure, strict=True):
        assert found["affinity"] == ("micro_step" if key[1] == "zero1 told" else "window")
        assert found["affinity"] != "window" or difference(found, wanted) < 3e-6


@pytest.mark.parametrize("key", some([(key,) for key in RESUMED], 3))
def test_a_run_resumed_in_its_second_epoch_is_the_same_run(outcomes: Outcomes, key: Key) -> None:
    for found in ranks(outcomes, key):
        assert found["epoch"] > 1
        assert found["resumed"]["windows"] == found["windows"] == 7
        assert torch.equal(found["resumed"]["parameters"], found["parameters"])
        assert torch.equal(found["resumed"]["weights"], found["weights"])


@saves_no_last_by_4
@pytest.mark.parametrize("key", some([(key,) for key in ENDED], 2))
def test_a_run_ended_by_sigterm_is_the_same_run(outcomes: Outcomes, key: Key) -> None:
    """The window goes to its end, on both ranks, its step is saved, and the run that goes on reaches the same bits."""
    for found in ranks(outcomes, key):
        assert found["step"] == BY["window"] + 1, BY
        assert found["saved"] == [f"checkpoint-{found['step']}"]
        assert not found["listens"]
        assert found["resumed"]["windows"] == found["windows"] == 3
        assert torch.equal(found["resumed"]["parameters"], found["parameters"]), BY
        assert torch.equal(found["resumed"]["weights"], found["weights"])
