"""A run that is killed and resumed ends with the bits of one that was not, and a checkpoint is whole or refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import launch
import pytest

WORLD_SIZE = 2
RUNS: list[dict[str, Any]] = [
    {"seed": seed, "stage": stage, "micro_steps": micro_steps, "dtype": dtype, "offload": offload, "moo": moo}
    for seed, stage, micro_steps, dtype, offload, moo in (
        (21, 2, 2, "fp32", False, {"aggregator": "pcgrad", "seed": 5}),
        (22, 1, 2, "fp32", False, {"aggregator": "gradvac", "granularity": "layer", "weight_smoothing": 0.5}),
        (23, 2, 1, "bf16", True, {"aggregator": "mgda"}),
        (24, 2, 3, "bf16", False, {"aggregator": "cagrad", "granularity": "model"}),
        (25, 3, 2, "fp32", False, {"aggregator": "gradvac", "seed": 5, "gram_every": 3}),
        (26, 3, 1, "bf16", False, {"aggregator": "cagrad"}),
        (27, 3, 2, "fp16", True, {"aggregator": "mgda", "granularity": "layer"}),
    )
]
# (stage, rank whose disk is full while DeepSpeed writes)
FILLS = [(0, 0), (1, 1), (2, 0), (3, 1)]
OTHERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"moo": {"languages": ["de", "pl", "fr"]}}, ["languages", "['de', 'fr', 'pl']", "['de', 'pl', 'fr']"]),
    ({"moo": {"granularity": "parameter"}}, ["blocks", "granularity"]),
    ({"moo": {}, "bucket_size": 500}, ["blocks", "reduce_bucket_size"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def _runs(name: str, folder: Path) -> list[dict[str, Any]]:
    return [{"name": name, "folder": str(folder / str(number)), **case} for number, case in enumerate(RUNS)]


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[list[Any]]:
    return launch.run("train_and_resume.py", WORLD_SIZE, _runs("uninterrupted", folder))


@pytest.fixture(scope="module")
def killed(folder: Path) -> list[list[Any]]:
    """Trains and saves all runs; then all ranks are killed in the middle of a window."""
    outcomes = launch.launch("train_and_resume.py", WORLD_SIZE, [*_runs("save", folder), {"name": "die_in_a_window"}])
    assert [outcome.status for outcome in outcomes] == [-signal.SIGKILL] * WORLD_SIZE, outcomes[0].output[-3000:]
    return [list(results) for results in zip(*(outcome.result for outcome in outcomes), strict=True)]


@pytest.fixture(scope="module")
def resumed(folder: Path, killed: list[list[Any]]) -> list[list[Any]]:
    """New processes: the runs go on, and others are asked to go on from them."""
    others = [{"name": "resume_with_other", "folder": str(folder / "0"), **other} for other, _ in OTHERS]
    return launch.run("train_and_resume.py", WORLD_SIZE, [*_runs("resume", folder), *others])


@pytest.fixture(scope="module")
def single(folder: Path) -> list[list[Any]]:
    cases = [
        {"name": "save_in_a_window", "folder": str(folder / "window1"), "stage": 1},
        {"name": "save_in_a_window", "folder": str(folder / "window2"), "stage": 2},
        {"name": "save_in_a_window", "folder": str(folder / "window3"), "stage": 3},
        {"name": "disk_full", "folder": str(folder / "full")},
        {"name": "plain_checkpoint", "folder": str(folder / "plain")},
        {"name": "save_16bit", "folder": str(folder / "16bit")},
        *(
            {"name": "disk_fills", "folder": str(folder / f"fills{number}"), "stage": stage, "rank": rank}
            for number, (stage, rank) in enumerate(FILLS)
        ),
    ]
    return launch.run("train_and_resume.py", WORLD_SIZE, cases)


@pytest.mark.parametrize("number", range(len(RUNS)), ids=lambda number: str(list(RUNS[number].values())[1:]))
def test_resumed_run_equals_uninterrupted_one(
    uninterrupted: list[list[Any]], killed: list[list[Any]], resumed: list[list[Any]], number: int
) -> None:
    for whole, before, after in zip(uninterrupted[number], killed[number], resumed[number], strict=True):
        for result in (whole, before, after):
            assert "error" not in result, result
        assert before["bits"] != whole["bits"]
        assert before["losses"] + after["losses"] == whole["losses"]
        for entry in ("bits", "windows", "counters", "sampler"):
            assert after[entry] == whole[entry]
        assert whole["windows"] == 6


@pytest.mark.parametrize("number", range(len(OTHERS)), ids=["languages", "granularity", "bucket size"])
def test_resuming_with_other_settings_is_refused(resumed: list[list[Any]], number: int) -> None:
    for result in resumed[len(RUNS) + number]:
        assert result["error"] == "ConfigError", result
        for words in OTHERS[number][1]:
            assert words in result["message"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saving_in_a_window_is_refused(single: list[list[Any]], folder: Path, stage: int) -> None:
    for result in single[stage - 1]:
        assert result["error"] == "BucketMOOError"
        assert "middle of a gradient accumulation window" in result["message"]
    assert not (folder / f"window{stage}").exists()


def test_disk_full_is_an_error_on_every_rank_and_the_last_checkpoint_stays(single: list[list[Any]]) -> None:
    for result in single[3]:
        assert "error" not in result, result
        assert "the checkpoint was not saved" in result["message"]
        assert "second" in result["message"]
        assert result["path"] == "first"
        assert result["bits"]
        assert result["windows"] == 1


@pytest.mark.parametrize("number", range(len(FILLS)), ids=[f"stage{stage}-rank{rank}" for stage, rank in FILLS])
def test_disk_that_fills_on_one_rank_is_an_error_on_all_and_the_last_checkpoint_stays(
    single: list[list[Any]], number: int
) -> None:
    for result in single[6 + number]:
        assert "error" not in result, result
        for words in ("was not saved", f"rank {FILLS[number][1]}: ", "second", "No space left on device"):
            assert words in result["message"]
        assert result["path"] == "first"
        assert result["bits"]
        assert result["latest"] == "second", "there is space again"


def test_checkpoint_of_plain_deepspeed_loads_with_a_warning(single: list[list[Any]]) -> None:
    for rank, result in enumerate(single[4]):
        assert "error" not in result, result
        assert result["same"]
        assert result["windows"] == 1
        if rank == 0:
            assert any("without bucket_moo" in message for message in result["messages"])


def test_gathered_16_bit_weights_are_the_models(single: list[list[Any]]) -> None:
    """`stage3_gather_16bit_weights_on_model_save`: DeepSpeed puts the chunks of all ranks together."""
    first, second = single[5]
    assert first == {"saved": True, "same": True, "dtypes": ["torch.bfloat16"]}
    assert second["saved"] is True
