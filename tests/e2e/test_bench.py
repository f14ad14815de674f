"""`bucketmoo bench kernels` as a user runs it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bucketmoo_ds.apps.bench import bandwidth, timing
from bucketmoo_ds.apps.cli.main import main

TINY = ("--device", "cpu", "--backends", "reference", "--languages", "3", "--numel", "20k", "--seconds", "600")
TINY += ("--threads", "1", "--repeats", "3", "--segment", "whole,4096", "--ops", "gram,accumulate_gram,combine,resolve")


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be the environment that chooses them."""
    monkeypatch.delenv("BUCKETMOO_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and copied between calls is as small as the shards are: nobody reads the times."""
    for module in (bandwidth, timing):
        monkeypatch.setattr(module, "MEBI", 1 << 10)
        monkeypatch.setattr(module, "cache_bytes", lambda device: 1 << 16)


def bench(*words: str) -> object:
    """The exit status of the command, whose imports take longer than it does: so it is run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    return ended.value.code


def test_json_goes_to_standard_output_and_progress_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert bench("kernels", *TINY, "--json", "--output", str(out)) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert len(result["lines"]) == 4 * 2 * 2
    assert "1/16 gram fp32 K=3 S=20000" in said.err
    assert json.loads((out / "kernels-cpu.json").read_text()) == result
    with (out / "kernels-cpu.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [(row["op"], row["dtype"], row["segments"]) for row in rows] == [
        (op, dtype, segments)
        for dtype in ("fp32", "bf16")
        for segments in ("1", "4")
        for op in ("gram", "accumulate_gram", "combine", "resolve")
    ]
    assert {(row["threads"], row["bucketmoo_ds"]) for row in rows} == {("1", result["versions"]["bucketmoo_ds"])}
    assert (out / "kernels-cpu.png").stat().st_size > 10_000


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("kernels", *TINY[:-2], "--ops", "gram", "--dtypes", "fp16") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "2e4" in line]
    assert "gram" in line
    assert "fp16" in line


def test_a_bad_value_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("kernels", "--dtypes", "bf61") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('bucketmoo: --dtypes "bf61": unknown')
    assert 'did you mean "bf16"?' in line
