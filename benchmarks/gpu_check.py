"""One part of what only a GPU can show, into `gpu-PART.json`; `scripts/gpu_check.sh` runs all of them, each by itself.

python benchmarks/gpu_check.py PART --out FOLDER [--device cpu]

On the CPU sizes are tiny and numbers say nothing: it is there to test this file. It needs torch, triton and pytest, no
more, and no installed package: the folder that holds `bucketmoo_ds` is on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from step_table import interval
from torch import Tensor, nn

import bucketmoo_ds as bm
from bucketmoo_ds import ops
from bucketmoo_ds.adapters import table
from bucketmoo_ds.apps.bench import cases, provenance
from bucketmoo_ds.apps.bench.inputs import Store
from bucketmoo_ds.apps.bench.sweep import sweep
from bucketmoo_ds.apps.bench.timing import Stopwatch, take_turns
from bucketmoo_ds.ops.backends import cuda

TESTS = Path(__file__).resolve().parents[1] / "tests" / "gpu"
LANGUAGES = ("de", "fr", "ru", "ko")
PAIRS = {"cuda": 21, "cpu": 3}  # of windows, one of each arm
SHOWN = 60  # lines of a profile

Found = dict[str, Any]


class CausalLM(nn.Module):
    """Layers of torch's own, an embedding and a head: with eight layers about 0.5e9 parameters on a GPU."""

    def __init__(self, device: torch.device, layers: int) -> None:
        super().__init__()
        width, self.words = (2048, 32_000) if device.type == "cuda" else (64, 128)
        self.embed = nn.Embedding(self.words, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, self.words, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss per target token."""
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten())


class Arm:
    """A model with its optimizer and one batch a micro-step. With a session each is of another language."""

    def __init__(self, model: nn.Module, words: int, device: torch.device) -> None:
        self.model = model
        self.session: Any = None
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
        shape = (len(LANGUAGES), 4, 1024) if device.type == "cuda" else (len(LANGUAGES), 2, 16)
        self._batches = list(torch.randint(words, shape, generator=torch.Generator().manual_seed(0)).to(device))

    def window(self) -> None:
        """All micro-steps and a step of the optimizer."""
        self.passes()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def passes(self) -> None:
        """Forward and backward of all micro-steps."""
        for language, ids in zip(LANGUAGES, self._batches, strict=True):
            named = {} if self.session is None else {"language": language}
            (self.model(input_ids=ids, labels=ids, **named) / len(LANGUAGES)).backward()


def build(device: torch.device, out: Path) -> Found:
    """Builds and loads the compiled backend for the device, or says why not."""
    began = time.monotonic()
    reasons = {name: ops.why_unavailable(name, device) for name in ops.BACKENDS}
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    bad = [f"{name}: {reasons[name]}" for name in wanted if reasons[name]]
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    return {"seconds": time.monotonic() - began, "capability": capability, "why_not": reasons, "failures": bad}


def tests(device: torch.device, out: Path) -> Found:
    """Runs those of tests/gpu that this run draws."""
    import pytest

    outcomes: dict[str, str] = {}

    class Keep:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.nodeid] = report.outcome

    root = TESTS.parents[1]
    words = ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), "-p", "no:cacheprovider"]
    status = pytest.main([*words, "-m", "gpu and not nightly", str(TESTS)], plugins=[Keep()])
    counts = {each: list(outcomes.values()).count(each) for each in ("passed", "failed", "skipped")}
    bad = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if status not in (0, 1):
        bad.append(f"pytest ends with status {int(status)}")
    return {**counts, "outcomes": outcomes, "failures": bad}


def once(device: torch.device, out: Path) -> Found:
    """Calls every op of the compiled backend once on little data, for compute-sanitizer to look at."""
    backend = "cuda" if device.type == "cuda" else "cpu"
    store = Store(device)
    called = []
    for case in _small_cases():
        store.inputs(case).call(backend)()
        called.append(str(case))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"called": called, "failures": []}


def _small_cases() -> Iterator[cases.Case]:
    """All the kernels of a GPU: those of few rows, of more, and of narrow ones."""
    for count, dtype in ((3, "fp32"), (12, "fp32"), (12, "bf16"), (3, "fp64")):
        for op in ("gram", "combine", "resolve", "accumulate_gram"):
            if op != "accumulate_gram" or dtype != "fp64":
                yield cases.Case(op, dtype, count, 20_000, 4_000, 2)
    yield cases.Case("min_norm", "fp64", 12, 0, cases.WHOLE, 3)


def kernels(device: torch.device, out: Path) -> Found:
    """Times every op at S = 1e8 against a copy of as many bytes."""
    on_gpu = device.type == "cuda"
    planned = cases.plan(full=False, device=device, elements=(100_000_000 if on_gpu else 100_000,))
    fast = [name for name in ops.BACKENDS if name != "reference" and not ops.why_unavailable(name, device)]
    found = sweep(planned, fast, device, repeats=20, seconds=55.0 if on_gpu else 5.0, compiled=False, say=print)
    return {"device": device.type, "threads": torch.get_num_threads(), **found.as_json(), "failures": []}


def resolve(device: torch.device, out: Path) -> Found:
    """Times `resolve` in one launch against three, on rows that lie in the cache as an exchange leaves them."""
    watch, store, lines = Stopwatch(device), Store(device), []
    for dtype in ("fp32", "bf16"):
        for count in (2, 4, 8, 16):
            case = cases.Case("resolve", dtype, count, (4_000_000 if device.type == "cuda" else 40_000) // count, 0, 1)
            inputs = store.inputs(case)
            given = (inputs.rows, inputs.mask, 1.0, inputs.spans, inputs.cells, inputs.out)
            calls: dict[str, Callable[[], object]] = {"fused": inputs.call("cpu"), "apart": inputs.separate_call("cpu")}
            if device.type == "cuda":
                calls = {
                    "fused": lambda given=given: cuda.resolve(*given, fused=True),
                    "apart": lambda given=given: cuda.resolve(*given, fused=False),
                }
            times = take_turns(calls, watch, repeats=50, seconds=2.0, warm=list(calls))
            lines.append(
                {
                    "dtype": dtype,
                    "K": count,
                    "S": case.elements,
                    "fused_ms": times["fused"].median,
                    "apart_ms": times["apart"].median,
                    "apart_by_fused": times["apart"].ratio_to(times["fused"]),
                }
            )
    return {"lines": lines, "failures": []}


def window(device: torch.device, out: Path) -> Found:
    """Runs one window of the single adapter while torch raises at every wait of the host for the device."""
    found: dict[str, str] = {}
    rules = ("mgda", "cagrad", "upgrad", "pcgrad", "mean")
    for aggregator, storage in [*((rule, "float32") for rule in rules), ("mgda", "host")]:
        model = CausalLM(device, layers=2).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        arm = Arm(model, model.words, device)
        config = bm.BucketMOOConfig(languages=LANGUAGES, aggregator=aggregator, row_storage=storage)
        arm.session = bm.single.register(model, config, micro_steps=len(LANGUAGES))
        for _ in range(2):  # tables are made, kernels compiled, memory pinned
            arm.window()
        found[f"{aggregator}, rows in {storage}"] = _waits(arm, device)
        assert arm.session.last.weights.shape[1] == len(LANGUAGES)
        del model, arm
    return {"waits": found, "failures": [f"{case}: {wait}" for case, wait in found.items() if wait]}


def _waits(arm: Arm, device: torch.device) -> str:
    """Returns where the host waits first, or ""."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        arm.passes()
    except RuntimeError as error:
        ours = [each for each in traceback.extract_tb(error.__traceback__) if "bucketmoo_ds" in each.filename]
        where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        return f"{str(error).splitlines()[0]}{where}"
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


def fsdp2(device: torch.device, out: Path) -> Found:
    """Times windows under FSDP2 at world size 1 with and without bucket_moo, in turns, and profiles one of ours."""
    with _one_rank(device):
        arms = {name: _sharded(device) for name in ("plain", "bucket_moo")}
        ours = arms["bucket_moo"]
        config = bm.BucketMOOConfig(languages=LANGUAGES, aggregator="mgda", granularity="layer")
        ours.session = bm.fsdp2.register(ours.model, config, micro_steps=len(LANGUAGES))
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        order, shuffle = list(arms), random.Random(0).shuffle
        for turn in range(2 + PAIRS[device.type]):
            shuffle(order)
            for name in order:
                taken = _timed(arms[name].window, device)
                if turn >= 2:
                    seconds[name].append(taken)
        profile = _profile(ours, device, out)
    ratios = [mine / plain for mine, plain in zip(seconds["bucket_moo"], seconds["plain"], strict=True)]
    return {
        "parameters": sum(each.numel() for each in ours.model.parameters()),
        "micro_steps": len(LANGUAGES),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "interval": interval(ratios),
        "profile": profile,
        "failures": [],
    }


def _sharded(device: torch.device) -> Arm:
    torch.manual_seed(0)
    model = CausalLM(device, layers=8 if device.type == "cuda" else 2).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wrap = table.find("fsdp2").wrap
    assert wrap is not None
    return Arm(wrap(model, list(model.layers), dtype, 0), model.words, device)


@contextlib.contextmanager
def _one_rank(device: torch.device) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _timed(call: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _profile(arm: Arm, device: torch.device, out: Path) -> list[Found]:
    """Writes a trace of a window; returns what took longest."""
    with torch.profiler.profile() as profiler:
        _timed(arm.window, device)
    profiler.export_chrome_trace(str(out / "gpu-fsdp2-trace.json.gz"))
    lines = [
        {
            "name": each.key,
            "calls": each.count,
            "device_us": each.self_device_time_total,
            "host_us": each.self_cpu_time_total,
        }
        for each in profiler.key_averages()
    ]
    return sorted(lines, key=lambda line: -max(line["device_us"], line["host_us"]))[:SHOWN]


PARTS = {each.__name__: each for each in (build, tests, once, kernels, resolve, window, fsdp2)}


def main() -> None:
    """Runs a part. Exits with 2 where there is no such device, and with 1 if the part found a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} finds no CUDA device, and this needs one")
        raise SystemExit(2)
    options.out.mkdir(parents=True, exist_ok=True)
    found = PARTS[options.part](torch.device(options.device), options.out)
    result = provenance.describe(("torch", "triton")) | {"part": options.part} | found
    (options.out / f"gpu-{options.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    for failure in found["failures"]:
        print(f"gpu_check: {options.part}: {failure}")
    raise SystemExit(bool(found["failures"]))


if __name__ == "__main__":
    main()
