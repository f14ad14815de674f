"""The ops on the CPU, from the library that `csrc/cpu` is built into: AVX-512, AVX2 or neither, as the machine has."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = [
    "accumulate_gram", "combine", "gram", "instruction_sets", "resolve", "solve", "unavailable",
    "using_instruction_set",
]  # fmt: skip

_instruction_set: ContextVar[str] = ContextVar("bucketmoo_instruction_set", default="")

DEVICES: tuple[str, ...] = ("cpu",)
PRIORITY = 1


def unavailable(device: torch.device) -> str:
    """Says why it cannot run on this device here; "" if it can."""
    return _load() if device.type == "cpu" else f"runs on cpu, not on {device.type}"


def instruction_sets() -> tuple[str, ...]:
    """Returns the names of those that the library has and this machine runs, the fastest first."""
    return tuple(_ops().instruction_sets().split())


@contextlib.contextmanager
def using_instruction_set(name: str) -> Iterator[None]:
    """Within it, ops use the instruction set of that name instead of the fastest: to test and to measure it."""
    token = _instruction_set.set(name)
    try:
        yield
    finally:
        _instruction_set.reset(token)


def gram(rows: Sequence[Tensor], spans: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """See `bucketmoo_ds.ops.gram`."""
    result: Tensor = _ops().gram(list(rows), spans, blocks, num_blocks, _instruction_set.get())
    return result


def accumulate_gram(
    rows: Sequence[Tensor],
    incoming: Sequence[Tensor],
    languages: Sequence[int],
    scales: Sequence[float],
    fresh: Sequence[bool],
    spans: Tensor,
    blocks: Tensor,
    num_blocks: int,
) -> Tensor:
    """See `bucketmoo_ds.ops.accumulate_gram`. Gradients in float64 are rounded to float32 first."""
    gradients = [each.float() if each.dtype is torch.float64 else each for each in incoming]
    void = [int(is_void) for is_void in fresh]
    result: Tensor = _ops().accumulate_gram(
        list(rows), gradients, list(languages), list(scales), void, spans, blocks, num_blocks, _instruction_set.get()
    )
    return result


def solve(gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """See `bucketmoo_ds.ops.solve`."""
    weights, finite = _ops().solve(gram.contiguous(), mask.contiguous(), max_weight)
    return weights, finite


def combine(rows: Sequence[Tensor], weights: Tensor, spans: Tensor, blocks: Tensor, out: Tensor) -> None:
    """See `bucketmoo_ds.ops.combine`."""
    _ops().combine(list(rows), weights.contiguous(), spans, blocks, out, _instruction_set.get())


def resolve(
    rows: Sequence[Tensor], mask: Tensor, max_weight: float, spans: Tensor, blocks: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bucketmoo_ds.ops.resolve`."""
    grams = gram(rows, spans, blocks, mask.shape[0])
    weights, finite = solve(grams, mask, max_weight)
    combine(rows, weights, spans, blocks, out)
    return grams, weights, finite


@functools.cache
def _load() -> str:
    """Loads the library once, and returns "", or why that does not work."""
    from bucketmoo_ds.ops import build

    try:
        torch.ops.load_library(build.cpu_library())
    except (build.BuildError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def _ops() -> torch._ops._OpNamespace:
    return torch.ops.bucketmoo_ds_cpu
