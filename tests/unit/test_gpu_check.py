"""The check that waits for a GPU: without one it says so, and its parts run on the CPU, on tiny data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from draw import some

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what it says without a CUDA device")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "results")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "finds no CUDA device" in done.stdout
    assert not list(tmp_path.glob("results/*.json"))


@pytest.mark.parametrize(
    "part",
    [
        *some([("once",), ("resolve",), ("window",)], 1),
        *(pytest.param(part, marks=pytest.mark.nightly) for part in ("build", "fsdp2")),  # the longest
    ],
)
def test_a_part_runs_on_the_cpu(part: str, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_check.py"
    command = [sys.executable, str(script), part, "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert found["part"] == part
    assert found["failures"] == []
    assert found["versions"]["torch"]
    if part == "fsdp2":
        assert found["interval"][0] <= found["ratio"] <= found["interval"][1]
        assert (tmp_path / "gpu-fsdp2-trace.json.gz").stat().st_size > 0
