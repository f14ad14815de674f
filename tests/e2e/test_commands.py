"""The `bucketmoo` command as a user runs it: in processes of its own, on small made-up text."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from draw import some
from safetensors.torch import load_file

from bucketmoo_ds.apps.cli.main import main
from bucketmoo_ds.apps.corpus import tokenizer
from bucketmoo_ds.apps.monitor.reader import read
from bucketmoo_ds.apps.training.models import load_model
from bucketmoo_ds.apps.training.settings import ModelSettings

LANGUAGES = ("aa", "bb", "cc")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text in four made-up languages, each with words of its own."""
    folder = tmp_path_factory.mktemp("text")
    for language in (*LANGUAGES, "en"):
        source = random.Random(language)
        words = ["".join(source.choices("abcdefghijklmnoprstuvwyz", k=source.randint(2, 8))) for _ in range(150)]
        (folder / language).mkdir()
        for page in range(10):
            paragraphs = [" ".join(source.choices(words, k=40)) for _ in range(12)]
            (folder / language / f"page{page}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=some([(2,), (3,)], 1), ids="zero{}".format)
def settings(text: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict:
    """What `bucketmoo train` reads, on one stage of ZeRO; a test adds its output folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = {name: [path.read_text() for path in sorted((text / name).iterdir())] for name in LANGUAGES}
    tokenizer.save(tokenizer.train(texts, 512), folder)
    return {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 512,
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "attention_dropout": 0.1,
                "tie_word_embeddings": True,
            },
            "tokenizer": str(folder),
        },
        "data": {"path": str(text)},
        "evaluation": {"data": {"path": str(text)}, "max_bytes": 2000},
        "training": {
            "steps": 8,
            "sequence_length": 32,
            "learning_rate": "4e-3",
            "checkpoint_every": 3,
            "evaluate_every": 3,
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {
                "stage": request.param,
                "reduce_bucket_size": 5000,
                "stage3_param_persistence_threshold": 100,
            },
            # What a resumed run has to find again: random orders, states, weights, and shares of the sampling.
            "bucket_moo": {
                "languages": list(LANGUAGES),
                "aggregator": "gradvac",
                "gram": "cross",
                "weight_smoothing": 0.3,
                "schedule": {"adapt": "doge"},
            },
        },
        "processes": 2,
    }


def bucketmoo(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bucketmoo_ds.apps.cli.main", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)


def write(folder: Path, settings: dict, name: str, **training: object) -> tuple[Path, Path]:
    output = folder / name
    changed = settings | {"output": str(output), "training": settings["training"] | training}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(changed))
    return path, output


def test_doctor_names_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_ends("doctor") == 0
    said = capsys.readouterr().out
    assert "reference" in said
    assert "deepspeed" in said


def test_unknown_backend_is_reported_by_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BUCKETMOO_BACKEND", "refrence")
    monkeypatch.setenv("COLUMNS", "200")
    main_ends("doctor")
    assert 'did you mean "reference"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "aggregators", "seeds"),
    [
        *some([("exact", "upgrad", 1), ("mixed", "cagrad", 1)], 1),
        pytest.param("exact", "mgda,upgrad", 2, marks=pytest.mark.nightly),
    ],
)
def test_quickstart_on_own_text(text: Path, tmp_path: Path, mode: str, aggregators: str, seeds: int) -> None:
    out = tmp_path / "out"
    words = ["--languages", "aa,bb", "--unseen", "cc", "--seeds", seeds, "--steps", 2, "--base-steps", 2]
    words += ["--mode", mode]
    done = bucketmoo("quickstart", "--data", text, *words, "--aggregators", aggregators, "--out", out, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["methods"] == ["averaging", *aggregators.split(",")]
    for method in results["methods"]:
        assert set(results["values"][method]) == {str(seed) for seed in range(seeds)}
        assert set(results["values"][method]["0"]) == {"aa", "bb", "cc"}
        assert (out / "runs" / f"{method}-seed{seeds - 1}" / "checkpoints" / "latest").exists()
        lines = (out / "runs" / f"{method}-seed0" / "metrics.jsonl").read_text().splitlines()
        run, first, *_ = map(json.loads, lines)
        assert (run["mode"] == "mixed") == (mode == "mixed" and method != "averaging")
        assert first["language_tokens"]["aa"] == first["language_tokens"]["bb"] > 0
        assert first["language_loss"]["aa"] != first["language_loss"]["bb"]
    page = (out / "report.html").read_text()
    assert aggregators.rsplit(",", maxsplit=1)[-1] in page
    assert "--aggregators" in (out / "command.txt").read_text()
    assert "averaging" in done.stdout
    assert main_ends("quickstart", "--out", out) == 2, "a second run must not overwrite the first"


@pytest.fixture(scope="module")
def whole(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing stopped."""
    path, output = write(tmp_path_factory.mktemp("whole"), settings, "whole")
    done = bucketmoo("train", path)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.skipif(sys.platform != "linux", reason="reads from /proc whether a rank listens")
@pytest.mark.parametrize(
    ("end", "rank"), some([("launcher", 0), ("dead_rank", 1), ("ctrl_c", 0), ("SIGTERM", 0), ("SIGTERM", 1)], 1)
)
def test_interrupted_run_equals_an_uninterrupted_one(
    settings: dict, whole: Path, tmp_path: Path, end: str, rank: int
) -> None:
    """A run that is ended, and resumed, ends with the same metrics and weights as one that is not, bit for bit: dropout
    is on, GradVac draws orders and keeps targets, and the shares of the sampling move. While it trains, a second one is
    refused.

    A killed run loses what came after its last checkpoint. One that is asked to end, by SIGTERM to one rank, loses no
    step: from the moment at which that rank listens, the ranks agree on a step, save it and end.
    """
    path, output = write(tmp_path, settings, "cut", checkpoint_every=1, save_on_signal=end == "SIGTERM")
    process = popen("train", path)
    try:
        if end == "SIGTERM":
            listening = listening_rank(process, path, rank)
        else:
            wait_for_a_checkpoint(process, output)
        ranks = workers(path)
        assert len(ranks) == 2, "ended before it was interrupted"
        for each in ranks:  # goes on when the second has been refused
            os.kill(each, signal.SIGSTOP)
        refused_beside(path, ranks)
        assert process.poll() is None, "the first run goes on"
        if end == "SIGTERM":
            os.kill(listening, signal.SIGTERM)
        elif end == "dead_rank":
            os.kill(rank_of(path, rank), signal.SIGKILL)
        elif end == "ctrl_c":
            process.send_signal(signal.SIGINT)
        else:
            process.kill()
    finally:
        for each in workers(path):
            os.kill(each, signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    everyone_ends(path)
    assert "Traceback" not in err
    kept = max(losses(output), default=0)
    if end == "SIGTERM":
        assert process.returncode == 130, err
        told = re.search(r"SIGTERM: saved a checkpoint of step (\d+); go on with --resume", err)
        assert told is not None, err
        assert f"latest checkpoint: step{told[1]}; go on with" in out
        assert kept == int(told[1])
    elif end == "ctrl_c":
        assert process.returncode == 130, err
        assert "interrupted; all ranks have ended" in err
        assert "--resume" in out
    elif end == "dead_rank":
        assert process.returncode == 1, err
        assert "killed by SIGKILL; the other ranks were ended" in err
    assert kept < settings["training"]["steps"], "too late to be an interruption"
    assert losses(output) == {step: loss for step, loss in losses(whole).items() if step <= kept}
    resumed = bucketmoo("train", path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(output) == losses(whole)
    assert weights(output) == weights(whole)
    assert "report.html" in resumed.stdout


def refused_beside(path: Path, ranks: list[int]) -> None:
    """A second run in the folder of a first one, of which these are the ranks."""
    second = bucketmoo("train", path, "--resume", timeout=120)
    assert second.returncode == 2
    holder = re.search(rf"process (\d+) on {re.escape(socket.gethostname())} trains there", second.stderr)
    assert holder is not None, second.stderr
    assert int(holder[1]) in ranks
    assert workers(path) == ranks


def test_the_whole_model_is_saved(settings: dict, whole: Path) -> None:
    """ZeRO-3 keeps chunks of the weights on each rank; what is saved is the model that it began with, trained."""
    saved = load_file(whole / "model" / "model.safetensors")
    begun = dict(load_model(ModelSettings(**settings["model"]), seed=0).named_parameters())
    assert saved.keys() == begun.keys()
    # AdamW moves an element by about the learning rate in each step, whichever sign its gradient has: by less than two
    # matrices of a standard deviation of 0.02 differ.
    most = 1.1 * settings["training"]["steps"] * float(settings["training"]["learning_rate"])
    for name, before in begun.items():
        moved = (saved[name] - before).abs().max()
        assert 0 < moved <= most, name
        assert before.std() > 0.01 or before.dim() == 1


def test_bad_settings_are_told_in_one_line(settings: dict, tmp_path: Path) -> None:
    """Here what a rank finds."""
    path = tmp_path / "bad.json"
    bad = {"output": str(tmp_path / "out"), "data": {"path": "/nowhere"}, "processes": 1}
    path.write_text(json.dumps(settings | bad))
    done = bucketmoo("train", path)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainning": {}}, 'trainning: unknown setting; did you mean "training"?'),
        ({"training": {"steps": 6, "sequence_length": 32, "learning_rate": "fast"}}, "training.learning_rate"),
        ({"deepspeed": {"bucketmoo": {}}}, 'did you mean "bucket_moo"?'),
    ],
)
def test_bad_settings_are_told_before_ranks_start(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(settings | {"output": str(tmp_path / "out")} | change))
    assert main_ends("train", path) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def main_ends(*words: object) -> object:
    """The exit status of the command, in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def popen(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bucketmoo_ds.apps.cli.main", *map(str, words)]
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_a_checkpoint(process: subprocess.Popen[str], output: Path, seconds: float = 120) -> None:
    """Returns once the first checkpoint of a run is whole."""
    deadline = time.monotonic() + seconds
    while not (output / "checkpoints" / "latest").exists():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, f"no checkpoint in {output} after {seconds} s"
        time.sleep(0.05)


def listening_rank(process: subprocess.Popen[str], path: Path, rank: int, seconds: float = 120) -> int:
    """Returns the process of a rank once it has a handler of its own for SIGTERM, which is before the first step."""
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, f"no rank of {path} listens after {seconds} s"
        worker = rank_of(path, rank)
        caught = re.search(r"^SigCgt:\s*(\w+)", proc(worker, "status"), re.MULTILINE)
        if caught is not None and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return worker
        time.sleep(0.02)


def rank_of(path: Path, rank: int) -> int:
    """Returns the process of a rank, or 0 where it has not started yet."""
    found = (worker for worker in workers(path) if f"RANK={rank}" in proc(worker, "environ").split("\0"))
    return next(found, 0)


def everyone_ends(path: Path, seconds: float = 20) -> None:
    """Ranks end with their launcher: within a second where nothing else runs, and a busy machine gets twenty."""
    deadline = time.monotonic() + seconds
    while workers(path):
        assert time.monotonic() < deadline, f"{workers(path)} outlive their launcher"
        time.sleep(0.05)


def proc(process: int, name: str) -> str:
    try:
        return Path(f"/proc/{process}/{name}").read_text()
    except OSError:  # it has just ended
        return ""


def workers(path: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"training.worker {path}"], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def losses(output: Path) -> dict[int, float | None]:
    return {record["step"]: record["loss"] for record in read(output / "metrics.jsonl") if record["event"] == "step"}


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()
