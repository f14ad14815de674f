"""One script under torchrun, `accelerate launch` and deepspeed, on one node and on two; and the file for SLURM, with
stubs in the place of its commands."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import launch
import pytest
from draw import some
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("launchers", ROOT / "benchmarks" / "launchers.py")
assert SPEC is not None
assert SPEC.loader is not None
launchers: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launchers)

CASES = list(itertools.product(launchers.LAUNCHERS, launchers.NODES, launchers.ENDED))


def wanted(wrapper: str, more: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The weights of two ranks that no launcher has started."""
    words, environment = launchers.ROWS["bm.Trainer", wrapper]
    for name, value in (launchers.CPU | environment).items():
        monkeypatch.setenv(name, value)
    file, *filled = (word.format(out=folder) for word in [*words, *more])
    outcomes = launch.launch("run_file.py", 2, {"file": str(ROOT / file), "words": filled, "leave": "'done'"})
    assert all(outcome.result == "done" for outcome in outcomes), outcomes[0].output[-3000:]
    return load_file(folder / "model" / "model.safetensors")


def assert_same(found: Path, weights: dict[str, Any]) -> None:
    saved = load_file(found / "model" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(each.equal(weights[name]) for name, each in saved.items())


@pytest.mark.parametrize(("launcher", "nodes", "wrapper"), some(CASES, 1))
def test_a_launcher_changes_nothing(
    launcher: str, nodes: int, wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, environment = launchers.ROWS["bm.Trainer", wrapper]
    run = launchers.Run(launcher, nodes, words, environment, tmp_path)
    assert run.wait(400) == 0, run.said()[-3000:]
    assert "step 6: 6 windows resolved" in run.said()
    assert_same(run.out, wanted(wrapper, [], tmp_path / "wanted", monkeypatch))


@pytest.mark.nightly
@pytest.mark.parametrize(("launcher", "nodes", "wrapper"), CASES)
def test_ended_by_sigterm_and_started_again(
    launcher: str, nodes: int, wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on from what the signal, to one node of two, has saved."""
    words, environment = launchers.ROWS["bm.Trainer", wrapper]
    words = [*words, *launchers.LONGER]
    run = launchers.Run(launcher, nodes, words, environment, tmp_path)
    saved = run.end(400)
    assert saved is not None, run.said()[-3000:]
    assert [each.name for each in run.out.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert not (run.out / "model").exists()
    again = launchers.Run(launcher, nodes, words, environment, tmp_path)
    assert again.wait(400) == 0, again.said()[-3000:]
    assert_same(run.out, wanted(wrapper, launchers.LONGER, tmp_path / "wanted", monkeypatch))


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*" >> "$LOG"; fi',
    "scancel": 'echo "scancel $*" >> "$LOG"; kill -TERM "$(cat "$LOG.task")"',
    "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
    "torchrun": 'trap "echo saved >> $LOG; exit 1" TERM; echo $$ > "$LOG.task"; echo "torchrun $*" >> "$LOG"; '
    "for _ in {1..200}; do sleep 0.05; done",
}


@pytest.mark.parametrize("ends", ["time limit", "preempted"])
def test_slurm_file_ends_its_tasks_and_comes_back(ends: str, tmp_path: Path) -> None:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    job = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "two", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = os.environ | job | {"LOG": str(log), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples" / "slurm.sbatch"), "--output_dir", "a folder"]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 20
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if ends == "time limit":
        process.send_signal(signal.SIGUSR1)
    else:
        process.send_signal(signal.SIGTERM)
        os.kill(int(log.with_suffix(".task").read_text()), signal.SIGTERM)
    assert process.wait(20) == 1
    asked = ["scancel --signal=TERM 31"] * (ends == "time limit")
    started, *rest = log.read_text().splitlines()
    assert started == (
        "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr first --master-port 20031 "
        "examples/train_trainer.py --enable_jit_checkpoint --output_dir a folder"
    )
    assert rest == [*asked, "saved", *["scontrol requeue 31"] * (ends == "time limit")]
