"""The Triton kernels where no GPU is: the interpreter runs them on the CPU, held against the reference backend.

It must be chosen before triton is imported, and then nothing can be compiled: so the tests proper, in the files below,
run in a process of their own, both at once: some of them, drawn anew, or in the nightly list all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from draw import SEED

pytest.importorskip("triton", reason="needs triton")

FOLDER = Path(__file__).parent
FILES = ("interpreted_ops.py", "interpreted_min_norm.py")


@pytest.fixture(
    scope="module", params=["not nightly", pytest.param("", marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])]
)
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["BUCKETMOO_TEST_SEED"] = str(SEED)
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", request.param, str(FOLDER / name)],
            cwd=FOLDER.parents[2], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in FILES
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(runs: dict[str, subprocess.Popen[str]], name: str) -> None:
    output, _ = runs[name].communicate()
    assert runs[name].returncode == 0, output
    assert re.search(r"\d+ passed", output), output
    assert "skipped" not in output, output
