"""A checkpoint of 2 ranks is taken up by 3 and by 1, through DeepSpeed's universal checkpoint, with our state."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import launch
import pytest
from deepspeed.checkpoint import ds_to_universal

from bucketmoo_ds.pipeline import checkpoint

CASES = [(1, "fp32"), (2, "bf16"), (3, "fp32")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(f"stage{stage}") for stage, _ in CASES]


@pytest.fixture(scope="module")
def saved(folders: list[Path]) -> list[list[Any]]:
    runs = [
        {"name": "save", "stage": stage, "dtype": dtype, "folder": str(folder)}
        for (stage, dtype), folder in zip(CASES, folders, strict=True)
    ]
    found = launch.run("load_universal.py", 2, runs)
    for folder in folders:
        _convert(folder / "saved", folder / "universal")
    return found


def _convert(source: Path, target: Path) -> None:
    """What `python ds_to_universal.py --inject_missing_state --input_folder ... --output_folder ...` does."""
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(arguments)


def _load(world_size: int, folders: list[Path]) -> list[list[Any]]:
    runs = [
        {"name": "load", "stage": stage, "dtype": dtype, "folder": str(folder)}
        for (stage, dtype), folder in zip(CASES, folders, strict=True)
    ]
    return launch.run("load_universal.py", world_size, runs)


def test_without_our_file_nothing_is_taken_up(saved: list[list[Any]], folders: list[Path]) -> None:
    """Runs before the file is copied."""
    for results in _load(2, folders):
        for result in results:
            assert result["error"] == "ConfigError", result
            for words in ("universal", checkpoint.FILE, "copy it there"):
                assert words in result["message"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_other_ranks_take_it_up(world_size: int, saved: list[list[Any]], folders: list[Path]) -> None:
    for folder in folders:
        shutil.copy(folder / "saved" / checkpoint.FILE, folder / "universal")
    for number, results in enumerate(_load(world_size, folders)):
        for result in results:
            assert "error" not in result, (CASES[number], result)
            assert result["weights"] == saved[number][0]["weights"], CASES[number]
            assert result["windows"] == saved[number][0]["windows"]
            assert result["goes_on"]
