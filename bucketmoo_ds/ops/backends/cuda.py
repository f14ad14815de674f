"""The ops on NVIDIA GPUs, from the library that `csrc/cuda` is built into: row addresses travel as kernel parameters,
weights stay on the device, and nothing waits for it.

Every op takes its segments as tiles, sorted by cell (`bucketmoo_ds.ops.backends.tiles`): they are dealt to the GPU's
blocks of threads in whole ranges, which makes sums the same from run to run, and evens out segments of very different
length.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds.ops import build
from bucketmoo_ds.ops.backends import libraries
from bucketmoo_ds.ops.backends.tiles import tiles_on_device

__all__ = ["accumulate_gram", "combine", "gram", "min_norm", "resolve", "unavailable"]

_GRADIENTS_A_LAUNCH = 64  # kMaxIncoming in csrc/cuda/launch.h

DEVICES: tuple[str, ...] = ("cuda",)
PRIORITY = 2


def unavailable(device: torch.device) -> str:
    """Says why it cannot run on this device here; "" if it can."""
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if build.architecture_of(capability) is None:
        *first, last = (f"{each[:-1]}.{each[-1]}" for each in build.ARCHITECTURES)
        return (
            f"has code for compute capability {', '.join(first)} and {last}, the device has "
            f"{capability[0]}.{capability[1]}"
        )
    return _load()


def gram(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """See `bucketmoo_ds.ops.gram`."""
    result: Tensor = _ops().gram(list(rows), *_tiles(rows, spans, cells, num_cells))
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
    """See `bucketmoo_ds.ops.accumulate_gram`."""
    tiles = _tiles(rows, spans, cells, num_cells)
    order = sorted((place for place, target in enumerate(targets) if target >= 0), key=targets.__getitem__)
    void = [row for row, is_void in enumerate(fresh) if is_void]
    starts = range(0, max(len(order), 1), _GRADIENTS_A_LAUNCH)
    launches = [order[start : start + _GRADIENTS_A_LAUNCH] for start in starts]
    for number, launch in enumerate(launches, start=1):
        given = [targets[place] for place in launch]
        last = number == len(launches)
        # A row that is still void in the last launch is one whose gradients come in it.
        result: Tensor = _ops().accumulate_gram(
            list(rows),
            incoming,
            launch,
            [bisect.bisect_left(given, row) for row in range(len(rows) + 1)],
            [scales[place] for place in launch],
            [row for row in void if row in given],
            *tiles,
            last,
        )
        void = [row for row in void if row not in given]
    return result


def min_norm(gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """See `bucketmoo_ds.ops.min_norm`."""
    weights, finite = _ops().min_norm(gram.contiguous(), mask.contiguous(), max_weight)
    return weights, finite


def combine(rows: Sequence[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor) -> None:
    """See `bucketmoo_ds.ops.combine`."""
    _ops().combine(list(rows), weights.contiguous(), *_tiles(rows, spans, cells, weights.shape[0]), out, False)


def resolve(
    rows: Sequence[Tensor],
    mask: Tensor,
    max_weight: float,
    spans: Tensor,
    cells: Tensor,
    out: Tensor,
    *,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bucketmoo_ds.ops.resolve`. Without `fused` never in one launch, to measure what that gains."""
    tiles = _tiles(rows, spans, cells, mask.shape[0])
    grams, weights, finite = _ops().resolve(list(rows), mask.contiguous(), max_weight, *tiles, out, fused)
    return grams, weights, finite


def _tiles(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> tuple[Tensor, Tensor, int]:
    device, elements = rows[0].device, rows[0].numel()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    # Half a megabyte of all rows keeps a block of threads busy; a shard gives every multiprocessor several tiles.
    longest = (1 << 19) // (len(rows) * rows[0].element_size())
    tile = max(1024, min(longest, elements // (8 * multiprocessors))) // 1024 * 1024
    return tiles_on_device(spans, cells, num_cells, elements, max(tile, 1024), device)


@functools.cache
def _load() -> str:
    """Loads the library once, and returns "", or why that does not work."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    found = {build.architecture_of(each) for each in capabilities}
    architectures = [each for each in build.ARCHITECTURES if each in found]
    return libraries.load(functools.partial(build.cuda_library, architectures))


def _ops() -> torch._ops._OpNamespace:
    return torch.ops.bucketmoo_ds_cuda
