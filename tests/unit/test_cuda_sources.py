"""The CUDA sources where no GPU is: they compile for sm_80 and sm_90 against a PyTorch without CUDA, keep everything in
registers, and their machine code has the loads and products that their speed and accuracy rest on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bucketmoo_ds.ops import build

SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile csrc/cuda; none is on the path"),
    pytest.mark.timeout(600),
]


def _compile(source: str, folder: Path) -> tuple[Path, str]:
    made = folder / f"{source}.o"
    command = ["nvcc", "-c", *build.NVCC_FLAGS, "-Xptxas=-v", f"-I{TORCH_INCLUDE}"]
    done = subprocess.run(
        [*command, str(SOURCES / source), "-o", str(made)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return made, done.stderr


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The object file and ptxas's report of each source; the slowest are started first."""
    folder = tmp_path_factory.mktemp("cuda")
    slowest_first = sorted(build.CUDA_SOURCES, key=lambda source: ("resolve_" not in source, source))
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: _compile(source, folder), slowest_first)
        return dict(zip(slowest_first, made, strict=True))


def test_every_source_is_listed() -> None:
    found = {path.name for path in SOURCES.iterdir() if path.suffix in (".cu", ".cpp")}
    assert found == set(build.CUDA_SOURCES)


def test_no_kernel_has_a_stack_frame_or_spills(compiled: dict[str, tuple[Path, str]]) -> None:
    seen = dict.fromkeys(build.ARCHITECTURES, 0)
    faults = []
    for source, (_, report) in compiled.items():
        entry = r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        for name, architecture, frame, spilled in re.findall(entry, report, re.DOTALL):
            seen[architecture] += 1
            if int(frame) or int(spilled):
                faults.append(f"{source} {name} sm_{architecture}: {frame} bytes of stack, {spilled} spilled")
        assert "warning" not in report.lower(), report
    assert not faults, "\n".join(faults)
    # 13 ways to take a Gram, alone and within resolve; 4 of float32 rows that gradients are added to, and one without
    # a Gram; adding up; solving; 4 dtypes to combine.
    expected = 13 + 13 + 5 + 1 + 1 + 4
    assert seen == dict.fromkeys(build.ARCHITECTURES, expected)


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_the_gram_loads_16_bytes_and_multiplies_where_it_should(
    compiled: dict[str, tuple[Path, str]], architecture: str
) -> None:
    kernels = _machine_code(compiled["gram.cu"][0], architecture)
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


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_nothing_adds_with_atomics(compiled: dict[str, tuple[Path, str]], architecture: str) -> None:
    for source in ("gram.cu", "add_partials.cu", "accumulate.cu", "combine.cu", "min_norm.cu"):
        for name, code in _machine_code(compiled[source][0], architecture).items():
            assert not re.search(r"\b(ATOM|ATOMG|RED|ATOMS)\b", code), name


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_combine_reads_and_writes_16_bytes(compiled: dict[str, tuple[Path, str]], architecture: str) -> None:
    kernels = _machine_code(compiled["combine.cu"][0], architecture)
    assert len(kernels) == 4
    for name, code in kernels.items():
        assert "LDG.E.128" in code, name
        # Two float64 sums are stored one by one: a row's vector has as many bytes as its result's.
        if "Float64" not in name:
            assert "STG.E.128" in code, name


def _machine_code(made: Path, architecture: str) -> dict[str, str]:
    """Returns the SASS of each kernel of an object file."""
    tool = _cuobjdump()
    done = subprocess.run(
        [tool, "-sass", "-arch", f"sm_{architecture}", str(made)], capture_output=True, text=True, check=False,
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
