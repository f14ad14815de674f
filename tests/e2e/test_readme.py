"""The README's Python, as it stands there: a user copies it, so it has to run."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def run(example: str, processes: int, leave: str, folder: Path) -> tuple[list[Any], str]:
    """Runs an example in a folder; returns what the expression is at its end on every rank, and the output of all."""
    path = folder / "train.py"
    path.write_text(example)
    arguments = {"file": str(path), "words": [], "leave": leave, "folder": str(folder)}
    outcomes = launch.launch("run_file.py", processes, arguments)
    output = "\n".join(outcome.output for outcome in outcomes)
    assert all(outcome.result is not None for outcome in outcomes), output[-4000:]
    return [outcome.result for outcome in outcomes], output


def test_deepspeed_example_trains(tmp_path: Path) -> None:
    example = next(block for block in BLOCKS if "bm.initialize" in block)
    (tmp_path / "text").mkdir()
    for language in ("de", "fr", "ru", "ko"):
        source = random.Random(language)
        (tmp_path / "text" / f"{language}.txt").write_text("".join(source.choices("abcdefgh ", k=64 * 24)))
    windows, output = run(example, 2, 'engine.moo.counters["windows"]', tmp_path)
    # 96 sequences, 4 a micro-batch, 2 ranks and 2 micro-steps a window.
    assert windows == [6, 6]
    assert "aggregator cagrad" in output


@pytest.mark.parametrize(
    ("wrap", "processes"), [("with_fsdp2", 2), ("with_fsdp1", 2), ("with_ddp", 2), ("alone", 1)]
)
def test_wrapper_example_trains(wrap: str, processes: int, tmp_path: Path) -> None:
    example = next(block for block in BLOCKS if "def with_fsdp2" in block)
    assert example.count("= with_fsdp2(") == 1
    changed = example.replace("= with_fsdp2(", f"= {wrap}(")
    windows, output = run(changed, processes, 'session.moo.counters["windows"]', tmp_path)
    assert windows == [10] * processes
    assert "aggregator cagrad" in output
    assert "tensor(" in output


def test_sampler_example_runs(tmp_path: Path) -> None:
    example = next(block for block in BLOCKS if "sampler.seek" in block)
    (languages,), output = run(example, 1, 'data[next(iter(sampler))]["language"]', tmp_path)
    assert "the first: " in output
    assert len(set(languages)) == 1


def test_results_are_those_of_the_committed_files() -> None:
    """Nobody types a benchmark's number by hand."""
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
