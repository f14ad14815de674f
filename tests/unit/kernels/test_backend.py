"""The Triton backend where no GPU is: when it may be chosen, and what it would launch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from draw import some

from bucketmoo_ds import ops
from bucketmoo_ds.errors import ConfigError

triton = pytest.importorskip("triton", reason="needs triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from bucketmoo_ds.kernels import aot, launch  # noqa: E402
from bucketmoo_ds.ops.backends import triton as backend  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing can be compiled")


def test_on_the_cpu_it_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r'bucket_moo\.backend = "triton": runs on cuda, .* TRITON_INTERPRET=1'):
        ops.gram([torch.ones(3)], torch.tensor([[0, 3]]), torch.tensor([0]), 1, backend="triton")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.unavailable(torch.device("cuda")).startswith("triton is not installed")


def test_it_is_imported_without_triton() -> None:
    """The choice among backends asks every module, also where triton cannot be installed."""
    code = "import sys; sys.modules['triton'] = None; import bucketmoo_ds.ops.backends.triton"
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[launch.Launch, tuple[int, ...], tuple[Any, ...]]]:
    """What is launched, instead of launching it."""
    calls: list[tuple[launch.Launch, tuple[int, ...], tuple[Any, ...]]] = []
    monkeypatch.setattr(
        launch.Launch, "__call__", lambda self, grid, *arguments: calls.append((self, grid, arguments))
    )
    return calls


@pytest.fixture
def a_device_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", _Device())


class _Device:
    """As much of a driver as Triton asks for when it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.usefixtures("a_device_to_compile_for")
def test_what_runs_is_what_was_compiled_ahead_of_time(
    launched: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton makes a kernel of its own for numbers that are 1, and for numbers and addresses that are multiples of 16:
    not for ours, and types are those of the table."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what another clone has compiled names its files
    rows = [torch.randn(1000) for _ in range(16)]
    spans, cells = torch.tensor([[0, 1000]]), torch.tensor([0])
    backend.accumulate_gram(rows, rows[0].clone().unsqueeze(0), [0], [1.0], [False] * 16, spans, cells, 1)
    backend.gram([row.bfloat16() for row in rows[:1]], spans, cells, 1)
    backend.min_norm(torch.ones(1, 16, 16, dtype=torch.float64), torch.ones(1, 16, dtype=torch.bool), 0.5)
    backend.combine(rows, torch.ones(1, 16, dtype=torch.float64), spans, cells, rows[0])
    by_name = {call[0].name: call for call in launched}
    kinds = {name.split()[0] for name in by_name}
    assert kinds == {"accumulate", "gram", "add", "min_norm", "combine"}
    for name, (made, _, arguments) in by_name.items():
        at_run_time = made.kernel.warmup(*arguments, grid=(1,), **made.constants, **made.options)
        assert at_run_time.asm["cubin"] == aot.compile_ahead(made, 90).asm["cubin"], name


@pytest.mark.parametrize(("count", "aligned"), some([(4, True), (8, False), (16, True), (64, True)], 1))
def test_accumulate_sums_in_the_order_of_gram(count: int, aligned: bool) -> None:
    """Its Gram is to the bit that of the finished rows if the same threads add up the same elements."""
    alone = _sums(launch.gram(torch.float32, count, aligned))
    assert alone
    assert alone == _sums(launch.accumulate(torch.bfloat16, count, aligned, aligned))


@pytest.mark.parametrize("dtype", list(launch.ELEMENTS))
def test_every_launch_is_in_the_table(dtype: torch.dtype) -> None:
    known = {made.name: made for made in launch.every_launch()}
    assert len(known) == len(list(launch.every_launch())), "names are unique"
    for count in range(1, 65):
        used = [launch.gram(dtype, count, aligned) for aligned in (True, False)]
        used += [launch.min_norm(count), launch.add_partials(count)]
        if dtype in launch.INCOMING:
            used += [launch.accumulate(dtype, count, *alike) for alike in ((True, True), (True, False), (False, False))]
        used += [launch.combine(dtype, out, aligned) for out in launch.ELEMENTS for aligned in (True, False)]
        for made in used:
            assert known[made.name] == made


def test_thousands_of_segments_are_one_launch(launched: list[tuple[Any, ...]]) -> None:
    lengths = torch.randint(1, 40, (20_000,))
    ends = lengths.cumsum(0)
    spans = torch.stack([ends - lengths, lengths], dim=1)
    elements = int(ends[-1])
    # Row by row behind each other at odd distances: no common alignment.
    rows = list(torch.randn(2, elements + (elements + 1) % 2))
    rows = [row[:elements] for row in rows]
    backend.gram(rows, spans, torch.arange(20_000) % 100, 100)
    names = [call[0].name for call in launched]
    assert names == ["gram float32 4 ragged", "add partials 4"]


@pytest.mark.parametrize(("offsets", "aligned"), [((0, 0), True), ((3, 3), True), ((0, 1), False)])
def test_rows_that_lie_alike_are_read_16_bytes_at_a_time(
    launched: list[tuple[Any, ...]], offsets: tuple[int, int], aligned: bool
) -> None:
    rows = [torch.randn(5000, dtype=torch.float32)[offset:4000] for offset in offsets]
    rows = [row[: min(map(len, rows))] for row in rows]
    elements = len(rows[0])
    backend.gram(rows, torch.tensor([[0, elements]]), torch.tensor([0]), 1)
    made, (runs,), (_, tiles, _, _, _) = launched[0]
    assert made.constants["ALIGNED"] == aligned
    assert runs >= 1
    if aligned:
        for start, length, _ in tiles.tolist():
            assert all((row.data_ptr() + 4 * start) % 16 == 0 for row in rows)
            assert length % 16 == 0


def test_positions_have_64_bits() -> None:
    code = (
        "import torch\n"
        "from bucketmoo_ds.ops.backends import reference, triton\n"
        "size = 2**31 + 4099\n"
        # Never written, so that next to nothing of it becomes memory.
        "rows = [torch.empty(size, dtype=torch.bfloat16) for _ in range(2)]\n"
        "for row in rows:\n"
        "    row[-3000:] = torch.randn(3000)\n"
        "spans, cells = torch.tensor([[size - 2500, 1], [size - 2400, 2300]]), torch.tensor([1, 0])\n"
        "expected = reference.gram(rows, spans, cells, 2)\n"
        "found = triton.gram(rows, spans, cells, 2)\n"
        # Sums of 15 exact products in float32, as kernels/gram.py states: 1e-6 of sums of 2300 squares.
        "assert float((found - expected).abs().max()) <= 3e-3, (found, expected)\n"
        "assert float(expected[:, 0, 0].min()) > 0\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tiles_are_cut_once_a_bucket() -> None:
    """However many buckets there are, and wherever the rows of a step lie."""
    buckets = [(torch.tensor([[0, length]]), torch.tensor([0])) for length in range(100, 500)]
    first = [backend._plan(rows, rows, *each, 1) for each in buckets for rows in [[torch.randn(600)]]]
    assert [backend._plan([torch.randn(600)], [torch.randn(600)], *each, 1) for each in buckets] == first
    buckets[0][0][0, 1] = 50
    assert backend._plan([torch.randn(600)], [torch.randn(600)], *buckets[0], 1) is not first[0], "other segments"


def _sums(made: launch.Launch) -> list[str]:
    """Returns the shapes and layouts, written out, of what is summed or multiplied in a kernel, in order."""
    code: str = aot.compile_ahead(made, 90).asm["ttgir"]
    layouts = dict(re.findall(r"^#(\w+) = (.*)$", code, re.MULTILINE))
    reductions_and_products = re.findall(r"(?:\}\) :|tt\.dot .*? :) (.*?)(?: loc\(|$)", code, re.MULTILINE)
    return [re.sub(r"#(\w+)", lambda name: layouts.get(name[1], name[0]), types) for types in reductions_and_products]
