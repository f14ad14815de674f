"""A sweep on tiny shards by the reference, and what is shown and written of it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bucketmoo_ds.apps.bench import bandwidth, files, provenance, sweep, table, timing
from bucketmoo_ds.apps.bench.cases import OPS, WHOLE, Case, plan
from bucketmoo_ds.apps.bench.plot import plot

CPU = torch.device("cpu")
SIZES = {"languages": (2, 3), "elements": (6000,), "segments": (WHOLE, 500), "dtypes": ("fp32", "bf16")}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bandwidth, timing):
        monkeypatch.setattr(module, "MEBI", 1 << 10)
        monkeypatch.setattr(module, "cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(sweep, "cache_bytes", lambda device: 30_000)


@pytest.fixture
def result() -> dict[str, Any]:
    # Without B=512: TorchJD takes seconds for it.
    cases = [case for case in plan(full=True, device=CPU, **SIZES) if case.num_blocks < 64]  # type: ignore[arg-type]
    said: list[str] = []
    found = sweep.sweep(cases, ["reference"], CPU, repeats=3, seconds=60.0, compiled=True, say=said.append)
    assert len(said) == len(cases)
    head = provenance.describe(("torch",)) | {"command": "bucketmoo bench kernels", "device": "cpu", "threads": 1}
    head["left_out"] = ["cuda: there is no GPU"]
    return head | found.as_json()


def test_every_case_has_a_line_whose_columns_agree(result: dict[str, Any]) -> None:
    assert {line["op"] for line in result["lines"]} == set(OPS)
    assert len(result["lines"]) == 2 + 2 * 2 * 2 * 4
    for line in result["lines"]:
        assert 0 < line["p20_ms"] <= line["p50_ms"] <= line["p80_ms"]
        assert line["repeats"] == 3
        assert line["torch_ms"] > 0 and line["vs_torch"] > 0
        assert line["vs_compile"] is None, "there is no GPU in this"
        has_torchjd = (line["op"], line["segments"]) in {("min_norm", 0), ("resolve", 1)}
        assert (line["vs_torchjd"] is not None) == has_torchjd
        moves = line["op"] != "min_norm"
        assert (line["floor_bytes"] is None, line["gb_per_s"] is None) == (not moves, not moves)
        if moves:
            # Every column is rounded to four digits.
            assert math.isclose(line["gb_per_s"], line["floor_bytes"] / line["p50_ms"] / 1e6, rel_tol=2e-3)
            assert math.isclose(line["share_of_copy"] * line["times_floor"], 1.0, rel_tol=2e-3)
        # Of two and three rows of 6000, only float32's three exceed 30,000 bytes.
        warm = line["op"] == "resolve" and line["K"] * line["S"] * (4 if line["dtype"] == "fp32" else 2) <= 30_000
        assert (line["cache"], line["vs_separate"] is not None) == ("warm" if warm else "flushed", warm)


def test_a_case_that_does_not_fit_is_skipped_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Case("gram", "fp32", 2, 1000, WHOLE, 1), Case("gram", "fp32", 64, 10**12, WHOLE, 1)
    said: list[str] = []
    found = sweep.sweep([large, small], ["reference"], CPU, repeats=1, seconds=1.0, compiled=True, say=said.append)
    assert [line.S for line in found.lines] == [1000]
    assert found.skipped[0].startswith("gram fp32 K=64 S=1000000000000: takes")
    assert said[0].startswith("skipped gram fp32 K=64")


def test_no_case_begins_when_the_time_is_over() -> None:
    cases = [Case("gram", "fp32", 2, elements, WHOLE, 1) for elements in (1000, 2000)]
    found = sweep.sweep(cases, ["reference"], CPU, repeats=1, seconds=1e-9, compiled=False, say=lambda message: None)
    assert found.lines == []
    assert found.skipped[1] == "gram fp32 K=2 S=2000: 1e-09 seconds are over; --seconds gives more"


def test_rows_that_are_kept_make_room_for_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    store = sweep.Store(CPU)
    case = Case("gram", "fp32", 2, 1000, WHOLE, 1)
    store.inputs(case)
    free = iter([case.needed_bytes(), 2 * case.needed_bytes()])
    monkeypatch.setattr(sweep, "free_bytes", lambda device: next(free))
    assert sweep._make_room(case, store, CPU) == ""
    assert not store._held


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with sweep.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_markdown_has_a_table_for_each_op(result: dict[str, Any]) -> None:
    text = table.to_markdown(result | {"skipped": ["gram fp64: takes 1 MiB"]})
    assert provenance.headline(result) in text
    assert "Skipped: gram fp64: takes 1 MiB." in text
    assert "Left out: cuda: there is no GPU." in text
    sections = text.split("\n### ")[1:]
    assert [section.split("\n")[0] for section in sections] == list(OPS)
    for section in sections:
        rows = [line for line in section.split("\n") if line.startswith("|")]
        assert len(rows) == 2 + sum(line["op"] == section.split("\n")[0] for line in result["lines"])
        assert len({row.count("|") for row in rows}) == 1
    assert "TorchJD" in sections[OPS.index("min_norm")]
    assert "TorchJD" not in sections[OPS.index("gram")]


def test_files_hold_every_line_and_where_it_was_measured(result: dict[str, Any], tmp_path: Path) -> None:
    written = files.write(result, tmp_path / "new")
    assert [path.name for path in written] == ["kernels-cpu.json", "kernels-cpu.csv", "kernels-cpu.png"]
    assert json.loads(written[0].read_text()) == result
    rows = list(csv.DictReader(io.StringIO(written[1].read_text())))
    for column in ("op", "backend", "K", "p50_ms", "share_of_copy", "vs_torchjd"):
        values = [line[column] for line in result["lines"]]
        assert [row[column] for row in rows] == ["" if value is None else str(value) for value in values]
    for row in rows:
        assert (row["device"], row["threads"]) == ("cpu", "1")
        assert row["device_name"] == result["machine"]["cpu"]
        assert row["torch"] == result["versions"]["torch"]
        assert row["commit"] == (result["commit"] or "")
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_nothing_is_plotted_of_min_norm_alone(result: dict[str, Any], tmp_path: Path) -> None:
    alone = result | {"lines": [line for line in result["lines"] if line["op"] == "min_norm"]}
    assert plot(alone) is None
    assert [path.name for path in files.write(alone, tmp_path)] == ["kernels-cpu.json", "kernels-cpu.csv"]
