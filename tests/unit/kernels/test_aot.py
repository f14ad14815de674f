"""Launches of the Triton kernels, compiled without a GPU, and what their machine code must be like.

`benchmarks/results/aot.json` is what came of every launch for sm_80 and sm_90, and all of it has to hold. Every run
compiles some launches of each kernel and dtype for sm_90, drawn anew, and finds what that file says of them; the
nightly list compiles all, for both.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from draw import SEED

pytest.importorskip("triton", reason="needs triton")

from bucketmoo_ds.kernels import aot, launch

COMMITTED = Path(__file__).resolve().parents[3] / "benchmarks/results/aot.json"
DRAWN = 1  # of each kernel and dtype

Kernel = dict[str, Any]

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing can be compiled")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(COMMITTED.read_text())
    return found


@pytest.fixture(scope="module")
def kernels(report: dict[str, Any]) -> list[Kernel]:
    found: list[Kernel] = report["kernels"]
    return found


def compiled(names: Iterable[str], architectures: Iterable[int], cache: Path) -> list[Kernel]:
    code = (
        "import json, os, sys\n"
        "from bucketmoo_ds.kernels import aot\n"
        "names, architectures = json.load(sys.stdin)\n"
        "print(json.dumps(aot.report(os.cpu_count(), set(names).__contains__, architectures)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([list(names), list(architectures)]),
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[Kernel] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(made: list[Kernel], report: dict[str, Any]) -> None:
    """Another Triton may well choose other instructions: then it is the properties of its own that have to hold."""
    if report["made_by"]["versions"]["triton"] != metadata.version("triton"):
        check_machine_code(made)
        return
    written = {(kernel["launch"], kernel["architecture"]): kernel for kernel in report["kernels"]}
    for kernel in made:
        assert kernel == written[kernel["launch"], kernel["architecture"]], (
            f"BUCKETMOO_TEST_SEED={SEED}; make the report anew: python benchmarks/aot.py --out {COMMITTED}"
        )


def test_drawn_launches_are_as_reported(report: dict[str, Any], tmp_path: Path) -> None:
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    groups: dict[str, list[str]] = {}
    for made in launch.every_launch():
        op, *rest = made.name.split()
        groups.setdefault(f"{op} {rest[0]}" if op in ("gram", "accumulate", "combine") else op, []).append(made.name)
    draw = random.Random(SEED)
    names = [name for group in groups.values() for name in draw.sample(group, min(DRAWN, len(group)))]
    made = compiled(names, [90], tmp_path)
    assert {kernel["launch"] for kernel in made} == set(names)
    check(made, report)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_every_launch_is_as_reported(report: dict[str, Any], tmp_path: Path) -> None:
    made = compiled([each.name for each in launch.every_launch()], aot.ARCHITECTURES, tmp_path)
    assert len(made) == len(report["kernels"])
    check(made, report)


def test_the_report_is_of_these_launches(kernels: list[Kernel]) -> None:
    assert [tuple(kernel[name] for name in ("launch", "architecture", "warps", "stages")) for kernel in kernels] == [
        (made.name, architecture, made.warps, made.stages)
        for made in launch.every_launch()
        for architecture in aot.ARCHITECTURES
    ]


def test_reported_kernels_are_as_they_must_be(kernels: list[Kernel]) -> None:
    # 4 dtypes by 5 sizes, 3 by 5, and 4 by 4.
    assert check_machine_code(kernels) == (20 + 15 + 16) * len(aot.ARCHITECTURES)


def check_machine_code(kernels: list[Kernel]) -> int:
    """Returns how many of them read rows that lie alike."""
    seen = 0
    for kernel in kernels:
        assert not kernel["stack_bytes"], f"its registers did not do: {kernel}"
        assert 16 <= kernel["registers"] <= 255, kernel
        # For two programs a multiprocessor: an A100 has 164 KB, an H200 228 KB.
        assert kernel["shared_bytes"] <= 80 << 10, kernel
        assert not kernel["tf32"], kernel
        assert not kernel["atomic"], kernel
        op, *rest = kernel["launch"].split()
        if op == "gram" and int(rest[1]) > 8 and rest[0] in ("bfloat16", "float16"):
            assert {"mma", "wgmma"} & set(kernel["products"]), kernel
        if op == "gram" and rest[0] == "float32":
            assert not {"mma", "wgmma"} & set(kernel["products"]), kernel
        if op in ("gram", "accumulate", "combine") and "ragged" not in rest:
            seen += 1
            # What is left are the entries of tables and weights, of 8 bytes each.
            assert set(kernel["loads"]) == {"8", "16"}, kernel
            if op == "combine":
                assert set(kernel["stores"]) == {"16"}, kernel
            if op == "accumulate":
                assert "16" in kernel["stores"], kernel
    return seen
