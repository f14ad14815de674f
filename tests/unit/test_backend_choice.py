"""The choice among the backends: the environment, the argument, `using`, and what is there, in this order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bucketmoo_ds import ops
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.logs import logger
from bucketmoo_ds.ops import build
from bucketmoo_ds.ops.backends import choice, cpu, cuda, libraries

ROWS, SPANS, CELLS = [torch.tensor([1.0, 2.0])], torch.tensor([[0, 2]]), torch.tensor([0])


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What has been chosen and loaded is forgotten before and after."""
    _forget()
    yield
    _forget()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged, whether or not the project's logger hands it on."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.levelname} {record.getMessage()}")

    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    def fail(installed: bool) -> str:
        raise build.BuildError("there is no C++ compiler g++-99")

    monkeypatch.setattr(build, "cpu_library", fail)


def test_an_explicit_choice_is_honoured_or_raises() -> None:
    for name in ops.BACKENDS:
        reason = ops.why_unavailable(name)
        if reason:
            with pytest.raises(ConfigError) as caught:
                ops.choose_backend(name)
            assert str(caught.value) == f'bucket_moo.backend = "{name}": {reason}'
        else:
            assert ops.choose_backend(name) == name
    assert ops.why_unavailable("cuda"), "it does not run on the CPU"


def test_the_environment_wins_over_the_argument_and_that_over_using(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.using("cuda"):
        assert ops.choose_backend("reference") == "reference"
        with pytest.raises(ConfigError, match='"cuda"'):
            ops.choose_backend()
        monkeypatch.setenv(ops.ENVIRONMENT, "reference")
        assert ops.choose_backend() == "reference"
        assert ops.choose_backend("cuda") == "reference"
        assert ops.choose_backend("no such backend") == "reference"
        monkeypatch.setenv(ops.ENVIRONMENT, "")
        assert ops.choose_backend("reference") == "reference"


def test_using_ends_with_its_block_also_by_an_exception() -> None:
    before = ops.choose_backend()
    with pytest.raises(KeyError), ops.using("reference"):
        assert ops.choose_backend() == "reference"
        raise KeyError
    assert ops.choose_backend() == before


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        ops.choose_backend("refrence")
    assert str(caught.value).startswith('bucket_moo.backend = "refrence": unknown, expected one of "auto"')
    assert 'did you mean "reference"?' in str(caught.value)
    monkeypatch.setenv(ops.ENVIRONMENT, "triton2")
    with pytest.raises(ConfigError, match='BUCKETMOO_BACKEND = "triton2": unknown'):
        ops.choose_backend("reference")


def test_every_op_honours_its_argument() -> None:
    weights, mask, out = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), torch.empty(2)
    calls = {
        "gram": (ROWS, SPANS, CELLS, 1),
        "accumulate_gram": (ROWS, torch.stack(ROWS), [0], [1.0], [False], SPANS, CELLS, 1),
        "combine": (ROWS, weights, SPANS, CELLS, out),
        "resolve": (ROWS, mask, SPANS, CELLS, out),
    }
    for name, arguments in calls.items():
        with pytest.raises(ConfigError, match=r'bucket_moo\.backend = "cuda"'):
            getattr(ops, name)(*arguments, backend="cuda")
    # What a backend of another device leaves on the CPU is solved by the CPU's own.
    assert ops.min_norm(torch.ones(1, 1, 1, dtype=torch.float64), mask, backend="cuda")[0].item() == 1.0


@pytest.mark.usefixtures("forgetful")
def test_the_automatic_choice_is_logged_once(lines: list[str]) -> None:
    name = ops.choose_backend()
    for _ in range(3):
        assert ops.gram(ROWS, SPANS, CELLS, 1).item() == 5.0
    chosen = [line for line in lines if "backend of the ops on cpu" in line]
    assert len(chosen) == 1
    assert f"backend of the ops on cpu: {name}" in chosen[0]
    assert chosen[0].startswith("INFO" if name == "cpu" else "WARNING")


@pytest.mark.usefixtures("_no_library")
def test_without_a_library_auto_takes_the_reference_and_says_why(lines: list[str]) -> None:
    assert ops.choose_backend() == "reference"
    assert ops.gram(ROWS, SPANS, CELLS, 1).item() == 5.0
    chosen = [line for line in lines if "backend of the ops on cpu" in line]
    assert chosen == ["WARNING backend of the ops on cpu: reference (cpu: there is no C++ compiler g++-99)"]


@pytest.mark.usefixtures("_no_library")
def test_without_a_library_an_explicit_cpu_raises() -> None:
    with pytest.raises(ConfigError) as caught:
        ops.gram(ROWS, SPANS, CELLS, 1, backend="cpu")
    assert str(caught.value) == 'bucket_moo.backend = "cpu": there is no C++ compiler g++-99'


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("runs", ["cuda", "triton", "reference"])
def test_a_device_that_falls_back_says_why_and_loudly_where_it_will_be_slow(
    runs: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"cuda": "nvcc is not there", "triton": "triton is not installed", "reference": ""} | {runs: ""}
    real = choice._load

    def fake(name: str) -> SimpleNamespace:
        return SimpleNamespace(DEVICES=real(name).DEVICES, unavailable=lambda device: reasons[name])

    monkeypatch.setattr(choice, "_load", fake)
    assert ops.choose_backend(device="cuda") == runs
    (line,) = (line for line in lines if "backend of the ops on cuda" in line)
    assert line.startswith("INFO" if runs == "cuda" else "WARNING")
    assert ("nvcc is not there" in line) == (runs != "cuda")
    assert ("triton is not installed" in line) == ("SLOWER" in line) == (runs == "reference")
    for name, reason in reasons.items():
        if reason:
            with pytest.raises(ConfigError, match=reason):
                ops.choose_backend(name, "cuda")


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    ("capability", "runs", "reason"),
    [
        ((9, 0), "cuda", ""),
        ((11, 0), "triton", "cuda: has code for compute capability 8.0, 9.0, 10.0 and 12.0, the device has 11.0"),
        ((7, 5), "reference", "triton: needs compute capability 8.0 or newer, the device has 7.5"),
    ],
)
def test_the_compute_capability_decides(
    capability: tuple[int, int], runs: str, reason: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(build, "cuda_library", lambda architectures, installed: asked.append(architectures))
    monkeypatch.setattr(libraries, "load", lambda find: find(installed=True) or "")
    assert ops.choose_backend(device="cuda") == runs
    (line,) = (line for line in lines if "backend of the ops on cuda:0: " in line)
    assert reason in line
    assert line.startswith("INFO" if runs == "cuda" else "WARNING")
    assert ("SLOWER" in line) == (runs == "reference")
    assert asked == ([["90"]] if runs == "cuda" else [])


@pytest.mark.parametrize("content", [b"", b"half of a libr", b"\x7fELF\x02\x01\x01"])
def test_a_file_that_is_no_library_is_a_reason(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "libbucketmoo_cpu.so"
    file.write_bytes(content)
    reason = libraries.load(lambda installed: str(file))
    assert f"{file} cannot be loaded" in reason
    assert "delete it" in reason
    assert len(reason.splitlines()) == 1


def test_where_the_library_of_a_wheel_cannot_be_loaded_another_is_built(tmp_path: Path) -> None:
    """It may have been made for a newer C library than this machine's."""
    of_the_wheel = tmp_path / "libbucketmoo_cpu.so"
    of_the_wheel.write_bytes(b"")
    assert libraries.load(lambda installed: str(of_the_wheel) if installed else build.cpu_library()) == ""

    def no_compiler(installed: bool) -> str:
        if installed:
            return str(of_the_wheel)
        raise build.BuildError("there is no C++ compiler g++")

    reason = libraries.load(no_compiler)
    assert f"{of_the_wheel} cannot be loaded" in reason
    assert reason.endswith("; there is no C++ compiler g++")


def _forget() -> None:
    choice._automatic.cache_clear()
    cpu._load.cache_clear()
    cuda._load.cache_clear()
