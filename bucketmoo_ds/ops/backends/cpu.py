"""The ops on the CPU, from the library that `csrc/cpu` is built into: AVX-512, AVX2 or neither, as the machine has."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from bucketmoo_ds.ops import build
from bucketmoo_ds.ops.backends import libraries

__all__ = [
    "accumulate_gram", "combine", "gram", "instruction_sets", "min_norm", "resolve", "unavailable",
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


def gram(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """See `bucketmoo_ds.ops.gram`."""
    result: Tensor = _ops().gram(list(rows), spans, cells, num_cells, _instruction_set.get())
    return result


def accumulate_gram(
    rows: Sequence[Tensor],
    incoming: Tensor,
    targets: Sequence[int],
    scales: Sequence[float],
    fresh: Sequence[bool],
    spans: Tensor,
    cells: Tensor,
    num_cells: int,
) -> Tensor:
    """See `bucketmoo_ds.ops.accumulate_gram`. Gradients in float64 are rounded to float32 first."""
    gradients = incoming.float() if incoming.dtype is torch.float64 else incoming
    void = [int(is_void) for is_void in fresh]
    result: Tensor = _ops().accumulate_gram(
        list(rows), gradients, list(targets), list(scales), void, spans, cells, num_cells, _instruction_set.get()
    )
    return result


def min_norm(gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """See `bucketmoo_ds.ops.min_norm`."""
    weights, finite = _ops().min_norm(gram.contiguous(), mask.contiguous(), max_weight)
    return weights, finite


def combine(rows: Sequence[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor) -> None:
    """See `bucketmoo_ds.ops.combine`."""
    _ops().combine(list(rows), weights.contiguous(), spans, cells, out, _instruction_set.get())


def resolve(
    rows: Sequence[Tensor], mask: Tensor, max_weight: float, spans: Tensor, cells: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bucketmoo_ds.ops.resolve`."""
    grams = gram(rows, spans, cells, mask.shape[0])
    weights, finite = min_norm(grams, mask, max_weight)
    combine(rows, weights, spans, cells, out)
    return grams, weights, finite


@functools.cache
def _load() -> str:
    """Loads the library once, and returns "", or why that does not work."""
    return libraries.load(build.cpu_library)


def _ops() -> torch._ops._OpNamespace:
    return torch.ops.bucketmoo_ds_cpu
