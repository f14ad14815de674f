"""The ops by Triton's kernels: `bucketmoo_ds.kernels`, launched by its table. Weights stay on the device, and nothing
waits for it.

A shard is cut into tiles, and these dealt to programs in runs (`tiles.py`). Where all rows lie alike within
16 bytes, most tiles begin and end at such a boundary, and one kernel loads 16 bytes at a time; what is left at
the ends of segments, and rows that do not lie alike, take a second one, which loads element by element.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import importlib.util
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bucketmoo_ds.ops.backends.segments import kept
from bucketmoo_ds.ops.backends.tiles import aligned_tile_tables, run_table, tile_table
from bucketmoo_ds.transfer import to_device

__all__ = ["accumulate_gram", "combine", "gram", "min_norm", "resolve", "unavailable"]

# Programs that share the tiles of a shard: each multiprocessor holds about four, and they change shifts once.
RUNS_A_MULTIPROCESSOR = 8
# Of what it reads, a program may write a 16th as its partial Gram; but every multiprocessor gets something to do.
BYTES_A_PARTIAL_BYTE = 16
# Of all rows of a tile. Half a megabyte makes light of what a tile costs apart from its elements. Float32 rows may be
# accumulated into, and are read again: what all programs hold must fit into the L2 cache (40 MB on an A100).
TILE_BYTES = 1 << 19
FLOAT32_TILE_BYTES = 1 << 16
# Elements: tiles are multiples of it, and aligned ones begin and end at multiples; 16 bytes of 16-bit elements are 8.
MULTIPLE = 16
VECTOR_BYTES = 16
LEAST_CAPABILITY = (8, 0)

DEVICES: tuple[str, ...] = ("cuda",)
PRIORITY = 1


def unavailable(device: torch.device) -> str:
    """Says why it cannot run on this device here; "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'bucketmoo-ds[kernels]')"
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return ""
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}; on the CPU only if TRITON_INTERPRET=1 is set"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}"
    return ""


def gram(rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """See `bucketmoo_ds.ops.gram`."""
    launch = _launches()
    plan = _plan(rows, rows, spans, cells, num_cells)
    partials = _partials(rows, plan)
    addresses = _table(_addresses(rows), rows[0].device)
    with _on(rows[0].device):
        for work in plan.works:
            launch.gram(rows[0].dtype, len(rows), work.aligned)(
                (work.inside,), addresses, work.tiles, work.runs, partials[work.slot :], len(rows)
            )
        return _add_partials(partials, plan, num_cells)


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
    launch = _launches()
    order = sorted((place for place, target in enumerate(targets) if target >= 0), key=targets.__getitem__)
    if not order:
        return gram(rows, spans, cells, num_cells)
    if incoming.dtype not in launch.INCOMING:
        incoming = incoming.float()
    plan = _plan(rows, rows, spans, cells, num_cells)
    partials = _partials(rows, plan)
    device = rows[0].device
    given = [targets[place] for place in order]
    first = [bisect.bisect_left(given, row) for row in range(len(rows) + 1)]
    owners = [(first[row], first[row + 1], int(fresh[row])) for row in range(len(rows))]
    scale_bits = torch.tensor(scales, dtype=torch.float32).view(torch.int32).tolist()
    start, step = incoming.data_ptr(), incoming.stride(0) * incoming.element_size()
    updates = [(start + place * step, scale_bits[place]) for place in order]
    tables = (
        _table(_addresses(rows), device),
        _table(tuple(number for owner in owners for number in owner), device),
        _table(tuple(number for update in updates for number in update), device),
    )
    some = [incoming[0], incoming[min(1, len(incoming) - 1)]]  # all are as far apart as the first two
    alike = _shift(rows) is not None and _shift([*rows, *some]) == _shift(rows)
    with _on(device):
        for work in plan.works:
            launch.accumulate(incoming.dtype, len(rows), work.aligned, alike)(
                (len(work.runs),), *tables, work.tiles, work.runs, partials[work.slot :], len(rows)
            )
        return _add_partials(partials, plan, num_cells)


def min_norm(gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """See `bucketmoo_ds.ops.min_norm`."""
    launch = _launches()
    blocks, count = mask.shape
    weights = torch.empty(mask.shape, dtype=torch.float64, device=mask.device)
    finite = torch.empty(blocks, dtype=torch.bool, device=mask.device)
    with _on(mask.device):
        launch.min_norm(count)(
            (blocks,), gram.contiguous(), mask.contiguous().view(torch.int8), weights, finite.view(torch.int8),
            int.from_bytes(struct.pack("<d", max_weight), "little"), count,
        )  # fmt: skip
    return weights, finite


def combine(rows: Sequence[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor) -> None:
    """See `bucketmoo_ds.ops.combine`."""
    launch = _launches()
    plan = _plan(rows, [*rows, out], spans, cells, weights.shape[0])
    addresses = _table(_addresses([*rows, out]), out.device)
    weights = weights.contiguous()
    with _on(out.device):
        # The last tiles first, as in each of the launches.
        for work in reversed(plan.works):
            launch.combine(rows[0].dtype, out.dtype, work.aligned)(
                (len(work.runs),), addresses, weights, work.tiles, work.runs, len(rows)
            )


def resolve(
    rows: Sequence[Tensor], mask: Tensor, max_weight: float, spans: Tensor, cells: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bucketmoo_ds.ops.resolve`. Three steps; `combine` begins with the tiles that `gram` has read last."""
    grams = gram(rows, spans, cells, mask.shape[0])
    weights, finite = min_norm(grams, mask, max_weight)
    combine(rows, weights, spans, cells, out)
    return grams, weights, finite


def _launches() -> ModuleType:
    """Triton is imported when an op is called: it need not be installed."""
    return importlib.import_module("bucketmoo_ds.kernels.launch")


class _Work(NamedTuple):
    """Tiles of one kind, on the device."""

    aligned: bool
    tiles: Tensor  # [T, 3]
    runs: Tensor  # [R, 3]
    inside: int  # how many runs lie in a segment; they come first
    slot: int  # of the partial Gram of the first


class _Plan(NamedTuple):
    works: tuple[_Work, ...]
    first: Tensor  # [works, C + 1]: where each cell's partials begin
    slots: int  # of partial Grams


def _plan(
    rows: Sequence[Tensor], all_of: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int
) -> _Plan:
    """Returns what the programs have to do, in tiles that are aligned in `all_of` these tensors where they can be."""
    device, elements = rows[0].device, rows[0].numel()
    size = len(rows) * rows[0].element_size()
    multiprocessors = _multiprocessors(device)
    runs = min(RUNS_A_MULTIPROCESSOR * multiprocessors, elements * size // (BYTES_A_PARTIAL_BYTE * 8 * len(rows) ** 2))
    runs = max(runs, multiprocessors)
    longest = (FLOAT32_TILE_BYTES if rows[0].dtype == torch.float32 else TILE_BYTES) // size
    tile = max(256, min(longest, elements // runs)) // MULTIPLE * MULTIPLE
    shift = _shift(all_of)
    return kept(
        spans,
        cells,
        (num_cells, elements, tile, runs, shift, device),
        lambda: _plan_on_device(spans, cells, num_cells, elements, tile, runs, shift, device),
    )


def _plan_on_device(
    spans: Tensor, cells: Tensor, num_cells: int, elements: int, tile: int, parts: int, shift: int | None,
    device: torch.device,
) -> _Plan:  # fmt: skip
    if shift is None:
        tables = [(False, tile_table(spans, cells, num_cells, elements, tile)[0])]
    else:
        aligned, ragged = aligned_tile_tables(spans, cells, num_cells, elements, tile, MULTIPLE, shift)
        tables = [(True, aligned[0]), (False, ragged[0])]
    works, firsts, slots = [], [], 0
    for is_aligned, table in tables:
        if len(table) == 0 and len(tables) > 1:
            continue
        runs, first = run_table(table, num_cells, parts)
        tiles, of_tiles = (to_device(each, torch.int64, device) for each in (table, runs))
        works.append(_Work(is_aligned, tiles, of_tiles, int(first[-1]), slots))
        firsts.append(first + slots)
        slots += int(first[-1])
    first = torch.stack(firsts) if firsts else torch.zeros(0, num_cells + 1, dtype=torch.int64)
    return _Plan(tuple(works), to_device(first, torch.int64, device), slots)


def _partials(rows: Sequence[Tensor], plan: _Plan) -> Tensor:
    # One more, so that a slice that nobody writes to has an address.
    return torch.empty(plan.slots + 1, len(rows), len(rows), dtype=torch.float64, device=rows[0].device)


def _add_partials(partials: Tensor, plan: _Plan, num_cells: int) -> Tensor:
    launch = _launches()
    count = partials.shape[1]
    result = torch.empty(num_cells, count, count, dtype=torch.float64, device=partials.device)
    launch.add_partials(count)((num_cells, count), partials, plan.first, result, count, num_cells, len(plan.works))
    return result


def _shift(tensors: Sequence[Tensor]) -> int | None:
    """Returns the element at which all tensors are aligned to 16 bytes; None if there is none."""
    for shift in range(VECTOR_BYTES // min(tensor.element_size() for tensor in tensors)):
        if all((tensor.data_ptr() + shift * tensor.element_size()) % VECTOR_BYTES == 0 for tensor in tensors):
            return shift
    return None


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(numbers, torch.int64, device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs programs one by one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
