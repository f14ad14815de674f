"""Every launch of the Triton kernels, compiled for sm_80 and sm_90 without a GPU, and what their machine code must be
like. A minute and a half on two cores of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton")

from bucketmoo_ds.kernels import aot, launch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
COMMITTED = BENCHMARKS / "results/aot.json"

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing can be compiled")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(out.parent / "cache")}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "aot.py"), "--out", str(out)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.exists(), done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())["kernels"]
    return found


def test_every_launch_is_compiled_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    expected = {(made.name, architecture) for made in launch.every_launch() for architecture in aot.ARCHITECTURES}
    assert {(kernel["launch"], kernel["architecture"]) for kernel in kernels} == expected
    assert len(kernels) == len(expected)


def test_the_committed_report_is_of_these_launches(kernels: list[dict[str, Any]]) -> None:
    committed = json.loads(COMMITTED.read_text())["kernels"]
    assert [(kernel["launch"], kernel["warps"], kernel["stages"]) for kernel in committed] == [
        (kernel["launch"], kernel["warps"], kernel["stages"]) for kernel in kernels
    ]


def test_no_kernel_has_a_stack_or_spills(kernels: list[dict[str, Any]]) -> None:
    assert [kernel for kernel in kernels if kernel["stack_bytes"]] == []
    assert all(16 <= kernel["registers"] <= 255 for kernel in kernels)


def test_shared_memory_suffices_for_two_programs_a_multiprocessor(kernels: list[dict[str, Any]]) -> None:
    # An A100 has 164 KB, an H200 228 KB.
    assert max(kernel["shared_bytes"] for kernel in kernels) <= 80 << 10


def test_rows_are_read_16_bytes_at_a_time(kernels: list[dict[str, Any]]) -> None:
    seen = 0
    for kernel in kernels:
        op, *rest = kernel["launch"].split()
        if op not in ("gram", "accumulate", "combine") or "ragged" in rest:
            continue
        seen += 1
        # What is left are the entries of tables and weights, of 8 bytes each.
        assert set(kernel["loads"]) == {"8", "16"}, kernel
        if op == "combine":
            assert set(kernel["stores"]) == {"16"}, kernel
        if op == "accumulate":
            assert "16" in kernel["stores"], kernel
    # 4 dtypes by 5 sizes, 3 by 5, and 4 by 4.
    assert seen == (20 + 15 + 16) * len(aot.ARCHITECTURES)


def test_products_are_of_the_right_kind(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert not kernel["tf32"], kernel
        assert not kernel["atomic"], kernel
        op, *rest = kernel["launch"].split()
        if op == "gram" and int(rest[1]) > 8 and rest[0] in ("bfloat16", "float16"):
            assert {"mma", "wgmma"} & set(kernel["products"]), kernel
        if op == "gram" and rest[0] == "float32":
            assert not {"mma", "wgmma"} & set(kernel["products"]), kernel
