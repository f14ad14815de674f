"""The CUDA sources where no GPU is: they compile against a PyTorch without CUDA, keep everything in
registers, and their machine code has the loads and products that their speed and accuracy rest on."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from draw import SEED
from unit.compiled import compiled, together

from bucketmoo_ds.ops import build

SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile csrc/cuda; none is on the path"),
    pytest.mark.timeout(600),
]


# Kernels by source: 13 ways to take a Gram, alone and within resolve; 4 of float32 rows that gradients are added to,
# and one without a Gram; adding up; solving; 4 dtypes to combine.
KERNELS = {
    "resolve_float.cu": 5, "resolve_bfloat16.cu": 4, "resolve_float16.cu": 4, "gram.cu": 13, "accumulate.cu": 5,
    "combine.cu": 4, "min_norm.cu": 1, "add_partials.cu": 1, "resolve.cu": 0, "bindings.cpp": 0,
}  # fmt: skip

# Whose registers the kernels are cut for; for newer ones some keep a few in memory (docs/kernels.md).
TUNED = ("80", "90")

Objects = dict[str, tuple[Path, str]]


class Target(NamedTuple):
    architecture: str
    sources: tuple[str, ...]  # the slowest first


def targets() -> Iterator[Any]:
    """One architecture, drawn anew in every run, with one of the two sources that take a Gram, and without the three
    that are slow to compile: they have the same kernels once more, in one launch; all of both in the nightly list."""
    draw = random.Random(SEED)
    architecture, other = draw.choice(TUNED), draw.choice(("gram.cu", "accumulate.cu"))
    first = tuple(name for name in KERNELS if not name.startswith("resolve_") and name != other)
    yield pytest.param(Target(architecture, first), id=f"sm_{architecture}")
    for architecture in TUNED:
        everything = Target(architecture, tuple(KERNELS))
        yield pytest.param(everything, marks=pytest.mark.nightly, id=f"all of sm_{architecture}")


@pytest.fixture(scope="module", params=list(targets()))
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


@pytest.fixture(scope="module")
def objects(target: Target) -> Objects:
    """The object file and ptxas's report of each source."""
    code = f"-gencode=arch=compute_{target.architecture},code=sm_{target.architecture}"
    command = ["nvcc", "-c", *build.NVCC_FLAGS, code, "-Xptxas=-v", f"-I{TORCH_INCLUDE}"]
    # Of torch, whose headers are many, the version stands for all files.
    depends_on = (SOURCES.parent, Path(torch.version.__file__))
    made = together(
        partial(compiled, [*command, str(SOURCES / name)], f"{name}.o", depends_on) for name in target.sources
    )
    return dict(zip(target.sources, made, strict=True))


def test_every_source_is_listed() -> None:
    found = {path.name for path in SOURCES.iterdir() if path.suffix in (".cu", ".cpp")}
    assert found == set(build.CUDA_SOURCES) == set(KERNELS)
    assert set(TUNED) < set(build.ARCHITECTURES)


def test_no_kernel_has_a_stack_frame_or_spills(target: Target, objects: Objects) -> None:
    faults = []
    for source, (_, report) in objects.items():
        entry = r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        entries = re.findall(entry, report, re.DOTALL)
        assert [architecture for _, architecture, _, _ in entries] == [target.architecture] * KERNELS[source], source
        for name, _, frame, spilled in entries:
            if int(frame) or int(spilled):
                faults.append(f"{source} {name}: {frame} bytes of stack, {spilled} spilled")
        assert "warning" not in report.lower(), report
    assert not faults, "\n".join(faults)


def test_the_gram_loads_16_bytes_and_multiplies_where_it_should(objects: Objects) -> None:
    if "gram.cu" not in objects:
        pytest.skip("accumulate.cu is drawn")
    kernels = _machine_code(objects["gram.cu"][0])
    tensor = {name: code for name, code in kernels.items() if "TensorGram" in name}
    others = {name: code for name, code in kernels.items() if "TensorGram" not in name}
    assert len(tensor) == 8
    assert len(others) == 5
    for name, code in tensor.items():
        assert "LDG.E.128" in code, name
        kind = r"HMMA\.16816\.F32\.BF16" if "BFloat16" in name else r"HMMA\.16816\.F32\s"
        assert re.search(kind, code), name
    for name, code in others.items():
        assert "LDG.E.128" in code, name
        # Neither float32 nor float64 rows go through tensor cores: no TF32.
        assert not re.search(r"\b[HD]MMA", code), name
        assert re.search(r"\bDFMA\b" if "StagedGramIdE" in name else r"\bFFMA\b", code), name


def test_nothing_adds_with_atomics(objects: Objects) -> None:
    for source in objects.keys() & {"gram.cu", "add_partials.cu", "accumulate.cu", "combine.cu", "min_norm.cu"}:
        for name, code in _machine_code(objects[source][0]).items():
            assert not re.search(r"\b(ATOM|ATOMG|RED|ATOMS)\b", code), name


def test_combine_reads_and_writes_16_bytes(objects: Objects) -> None:
    kernels = _machine_code(objects["combine.cu"][0])
    assert len(kernels) == 4
    for name, code in kernels.items():
        assert "LDG.E.128" in code, name
        # Two float64 sums are stored one by one: a row's vector has as many bytes as its result's.
        if "Float64" not in name:
            assert "STG.E.128" in code, name


def _machine_code(made: Path) -> dict[str, str]:
    """Returns the SASS of each kernel of an object file."""
    tool = _cuobjdump()
    done = subprocess.run(
        [tool, "-sass", str(made)], capture_output=True, text=True, check=False,
        # It calls nvdisasm, which lies beside it.
        env={**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names_and_codes = re.split(r"\n\s*Function : (\S+)\n", done.stdout)[1:]
    return dict(zip(names_and_codes[::2], names_and_codes[1::2], strict=True))


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="needs cuobjdump: none is on the path, and no triton that has one")
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (folder / "cuobjdump").exists() or not (folder / "nvdisasm").exists():
        pytest.skip(f"needs cuobjdump and nvdisasm: neither on the path nor in {folder}")
    return str(folder / "cuobjdump")
