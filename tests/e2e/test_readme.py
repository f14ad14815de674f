"""The README's Python, as it stands there: a user copies it, so it has to run."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from draw import some

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

# Spares a minute of compiling DeepSpeed's shared-memory collective, which the README tells of.
PREAMBLE = 'import deepspeed\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'


def test_deepspeed_example_trains(tmp_path: Path) -> None:
    example = next(block for block in BLOCKS if "bm.initialize" in block)
    (tmp_path / "text").mkdir()
    for language in ("de", "fr", "ru", "ko"):
        source = random.Random(language)
        (tmp_path / "text" / f"{language}.txt").write_text("".join(source.choices("abcdefgh ", k=64 * 24)))
    # Into a file of each rank: two processes that print at once may mix their lines.
    check = '\nPath(f"windows{engine.global_rank}").write_text(str(engine.moo.counters["windows"]))\n'
    (tmp_path / "finetune.py").write_text(PREAMBLE + example + check)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "finetune.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    # 96 sequences, 4 a micro-batch, 2 ranks and 2 micro-steps a window.
    left = [tmp_path / "windows0", tmp_path / "windows1"]
    assert all(path.exists() for path in left), done.stderr[-2000:]
    assert [path.read_text() for path in left] == ["6", "6"]
    assert "aggregator cagrad" in done.stderr


@pytest.mark.parametrize(
    ("wrap", "processes"), some([("with_fsdp2", 2), ("with_fsdp1", 2), ("with_ddp", 2), ("alone", 1)], 2)
)
def test_wrapper_example_trains(wrap: str, processes: int, tmp_path: Path) -> None:
    example = next(block for block in BLOCKS if "def with_fsdp2" in block)
    assert example.count("= with_fsdp2(") == 1
    check = '\nopen(f"windows{dist.get_rank()}", "w").write(str(session.moo.counters["windows"]))\n'
    (tmp_path / "train.py").write_text(example.replace("= with_fsdp2(", f"= {wrap}(") + check)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc_per_node={processes}", "train.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    left = [tmp_path / f"windows{rank}" for rank in range(processes)]
    assert all(path.exists() for path in left), done.stderr[-2000:]
    assert [path.read_text() for path in left] == ["10"] * processes
    assert "aggregator cagrad" in done.stderr
    assert "tensor(" in done.stdout


def test_sampler_example_runs(tmp_path: Path) -> None:
    example = next(block for block in BLOCKS if "sampler.seek" in block)
    command = [sys.executable, "-c", example]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    languages = re.search(r"the first: (.*)", done.stdout)
    assert languages is not None
    assert len(set(re.findall(r"'(\w+)'", languages[1]))) == 1


def test_results_are_those_of_the_committed_files() -> None:
    """Nobody types a benchmark's number by hand."""
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
