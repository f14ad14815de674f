"""The options of `bucketmoo bench kernels`: bad ones are told in one line, before anything is measured."""

from __future__ import annotations

import argparse

import pytest
import torch

from bucketmoo_ds.apps.bench.cases import WHOLE
from bucketmoo_ds.apps.cli import bench
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.ops.backends import choice

CPU = torch.device("cpu")


class Backend:
    """Stands for a module of `bucketmoo_ds.ops.backends`."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def unavailable(self, device: torch.device) -> str:
        return self.reason


@pytest.fixture(autouse=True)
def four_backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backend]:
    monkeypatch.delenv("BUCKETMOO_BACKEND", raising=False)
    found = {name: Backend() for name in ("reference", "cpu", "triton")} | {"cuda": Backend("runs on cuda")}
    monkeypatch.setattr(choice, "_load", found.__getitem__)
    return found


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    bench.run(parser.parse_args(["kernels", *words]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ops", "gram,resolv"), '--ops "resolv": unknown, expected .* did you mean "resolve"'),
        (("--dtypes", "float"), '--dtypes "float": unknown'),
        (("--languages", "65"), '--languages "65": expected a whole number from 1 to 64'),
        (("--languages", "8,-2"), '--languages "-2"'),
        (("--languages", ","), '--languages ",": expected at least one value'),
        (("--numel", "ten"), '--numel "ten": expected a number such as 10M'),
        (("--numel", "0.5"), '--numel "0.5"'),
        (("--segment", "all"), '--segment "all": expected "whole"'),
        (("--segment", "2M", "--numel", "1M"), "--segment 2000000: longer than a shard"),
        (("--device", "gpu"), '--device "gpu": expected "cpu" or "cuda"'),
        (("--threads", "0"), '--threads "0": expected a whole number from 1'),
        (("--repeats", "many"), '--repeats "many"'),
        (("--seconds", "0"), '--seconds "0"'),
        (("--backends", "cpp"), '--backends "cpp": unknown'),
        (("--backends", "cuda"), '"cuda": runs on cuda'),
    ],
)
def test_bad_values(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run("--device", "cpu", *words)
    assert "\n" not in str(caught.value)


def test_only_kernels_are_measured() -> None:
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    with pytest.raises(ConfigError, match=r'bench "kernel": unknown, expected "kernels"'):
        bench.run(parser.parse_args(["kernel"]))


def test_all_fast_backends_that_run_are_measured_and_the_others_are_told(four_backends: dict[str, Backend]) -> None:
    found, left_out = bench._backends(None, CPU)
    assert found == ["cpu"]
    assert [sentence.split(":")[0] for sentence in left_out] == ["triton", "cuda", "reference"]
    assert left_out[1] == "cuda: runs on cuda"
    assert bench._backends("reference,cpu", CPU) == (["reference", "cpu"], [])
    four_backends["cpu"].reason = "no compiler"
    found, left_out = bench._backends(None, CPU)
    assert found == ["reference"]
    assert left_out[0] == "cpu: no compiler"


def test_tritons_interpreter_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="interpreter"):
        bench._backends("triton", CPU)
    monkeypatch.setenv("BUCKETMOO_BACKEND", "triton")
    with pytest.raises(ConfigError, match="interpreter"):
        bench._backends(None, CPU)
    assert bench._backends(None, torch.device("cuda")) == (["triton"], [])


def test_the_environments_backend_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKETMOO_BACKEND", "reference")
    assert bench._backends(None, CPU) == (["reference"], [])
    assert bench._backends("reference", CPU) == (["reference"], [])
    with pytest.raises(ConfigError, match='--backends "cpu": BUCKETMOO_BACKEND = "reference" overrides it'):
        bench._backends("cpu", CPU)


def test_numbers_are_read_with_their_units() -> None:
    assert bench._values("--numel", "10M,500k,1.5k,7,7", bench._elements) == (10_000_000, 500_000, 1_500, 7)
    assert bench._values("--segment", "whole,4096", bench._segment) == (WHOLE, 4096)


def test_cuda_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench._device("auto") == CPU
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        bench._device("cuda")
