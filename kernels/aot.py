"""Compiles every launch of the kernels to machine code, without a GPU, and reports what came of it; `benchmarks/aot.py`
writes that down."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bucketmoo_ds.kernels.arguments import ARGUMENTS
from bucketmoo_ds.kernels.launch import INTERPRETED, Launch, every_launch

ARCHITECTURES = (80, 90)


def report(
    workers: int, wanted: Callable[[str], bool] = lambda name: True, architectures: Sequence[int] = ARCHITECTURES
) -> list[dict[str, Any]]:
    """Compiles every launch whose name is wanted for each architecture.

    Returns:
        For each, in the order of the table: launch, architecture, warps, stages, registers (of a thread), stack_bytes
        (of a thread; spilled registers are kept there), shared_bytes (of a program); loads and stores, how many
        instructions there are by the bytes that each thread reads or writes with one; and the kinds of products
        (`mma`, `wgmma`, `fma`) and whether any is of TF32 or any addition atomic.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that there is nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile the kernels")
    names = [launch.name for launch in every_launch() if wanted(launch.name)]
    jobs = [(name, architecture) for name in names for architecture in architectures]
    with ProcessPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(_compiled, *zip(*jobs, strict=True), chunksize=4))


def compile_ahead(launch: Launch, architecture: int) -> Any:
    """Returns Triton's `CompiledKernel` of a launch."""
    signature = {
        argument: "constexpr" if argument in launch.constants else ARGUMENTS[argument]
        for argument in launch.kernel.arg_names
    }
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs={})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def _compiled(name: str, architecture: int) -> dict[str, Any]:
    launch = _launches()[name]
    made = compile_ahead(launch, architecture)
    assembly: str = made.asm["ptx"]
    return {
        "launch": name,
        "architecture": architecture,
        "warps": launch.warps,
        "stages": launch.stages,
        **_resources(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "loads": _widths(assembly, r"ld\.global", r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)"),
        "stores": _widths(assembly, r"st\.global"),
        "products": sorted({kind for kind in ("wgmma", "mma", "fma") if re.search(rf"\s{kind}\.", assembly)}),
        "tf32": "tf32" in assembly,
        "atomic": bool(re.search(r"\s(atom|red)\.", assembly)),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers: {done.stdout}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack_bytes": stack + local}


def _widths(assembly: str, instruction: str, copy: str | None = None) -> dict[str, int]:
    """Returns how many instructions there are by bytes."""
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(rf"{instruction}[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", assembly):
        widths[int(vector or 1) * int(bits) // 8] += 1
    if copy is not None:
        widths.update(int(width, 16) for width in re.findall(copy, assembly))
    return {str(width): number for width, number in sorted(widths.items())}


@functools.cache
def _launches() -> dict[str, Launch]:
    return {launch.name: launch for launch in every_launch()}
