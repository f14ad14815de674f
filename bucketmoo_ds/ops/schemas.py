"""Schemas and fakes of the ops, each once. The one implementation of each checks its input and calls a backend."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bucketmoo_ds.ops.backends.checks import MAX_ROWS, check_combine, check_incoming, check_min_norm, check_rows
from bucketmoo_ds.ops.backends.choice import load_backend, load_solver
from bucketmoo_ds.ops.groups import Grouped

_library = torch.library.Library("bucketmoo_ds", "FRAGMENT")

_SEGMENTS = "Tensor spans, Tensor cells"
_library.define(f"gram(Tensor[] rows, {_SEGMENTS}, int num_cells, *, str backend='auto') -> Tensor")
_library.define(
    "accumulate_gram(Tensor(a!)[] rows, Tensor incoming, int[] targets, float[] scales, bool[] fresh, "
    f"{_SEGMENTS}, int num_cells, *, str backend='auto') -> Tensor"
)
_library.define("min_norm(Tensor gram, Tensor mask, *, float max_weight=1.0, str backend='auto') -> (Tensor, Tensor)")
_library.define(f"combine(Tensor[] rows, Tensor weights, {_SEGMENTS}, Tensor(a!) out, *, str backend='auto') -> ()")
_library.define(
    f"resolve(Tensor[] rows, Tensor mask, {_SEGMENTS}, Tensor(a!) out, *, float max_weight=1.0, str backend='auto') "
    "-> (Tensor, Tensor, Tensor)"
)


def _for_rows(count: int, backend: ModuleType) -> ModuleType | Grouped:
    """Returns the backend, or what calls it with groups of rows where it does not take so many."""
    return backend if count <= MAX_ROWS else Grouped(backend)


def _gram(rows: list[Tensor], spans: Tensor, cells: Tensor, num_cells: int, *, backend: str = "auto") -> Tensor:
    check_rows(rows, spans, cells, num_cells)
    result: Tensor = _for_rows(len(rows), load_backend(backend, rows[0].device)).gram(rows, spans, cells, num_cells)
    return result


def _accumulate_gram(
    rows: list[Tensor],
    incoming: Tensor,
    targets: list[int],
    scales: list[float],
    fresh: list[bool],
    spans: Tensor,
    cells: Tensor,
    num_cells: int,
    *,
    backend: str = "auto",
) -> Tensor:
    check_rows(rows, spans, cells, num_cells)
    check_incoming(rows, incoming, targets, scales, fresh)
    module = _for_rows(len(rows), load_backend(backend, rows[0].device))
    result: Tensor = module.accumulate_gram(rows, incoming, targets, scales, fresh, spans, cells, num_cells)
    return result


def _min_norm(gram: Tensor, mask: Tensor, *, max_weight: float = 1.0, backend: str = "auto") -> tuple[Tensor, Tensor]:
    check_min_norm(gram, mask, max_weight)
    solver = _for_rows(mask.shape[1], load_solver(backend, gram.device))
    result: tuple[Tensor, Tensor] = solver.min_norm(gram, mask, max_weight)
    return result


def _combine(
    rows: list[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor, *, backend: str = "auto"
) -> None:
    check_rows(rows, spans, cells, weights.shape[0])
    check_combine(rows, weights, out)
    module = _for_rows(len(rows), load_backend(backend, rows[0].device))
    module.combine(rows, weights.to(rows[0].device), spans, cells, out)


def _resolve(
    rows: list[Tensor],
    mask: Tensor,
    spans: Tensor,
    cells: Tensor,
    out: Tensor,
    *,
    max_weight: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(rows, spans, cells, mask.shape[0])
    check_min_norm(None, mask, max_weight)
    check_combine(rows, mask, out)
    module = _for_rows(len(rows), load_backend(backend, rows[0].device))
    result: tuple[Tensor, Tensor, Tensor] = module.resolve(rows, mask, max_weight, spans, cells, out)
    return result


for _name, _implementation in {
    "gram": _gram,
    "accumulate_gram": _accumulate_gram,
    "min_norm": _min_norm,
    "combine": _combine,
    "resolve": _resolve,
}.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)


@torch.library.register_fake("bucketmoo_ds::gram", lib=_library)
def _(rows: list[Tensor], spans: Tensor, cells: Tensor, num_cells: int, *, backend: str = "auto") -> Tensor:
    return rows[0].new_empty((num_cells, len(rows), len(rows)), dtype=torch.float64)


@torch.library.register_fake("bucketmoo_ds::accumulate_gram", lib=_library)
def _(
    rows: list[Tensor],
    incoming: Tensor,
    targets: list[int],
    scales: list[float],
    fresh: list[bool],
    spans: Tensor,
    cells: Tensor,
    num_cells: int,
    *,
    backend: str = "auto",
) -> Tensor:
    return rows[0].new_empty((num_cells, len(rows), len(rows)), dtype=torch.float64)


@torch.library.register_fake("bucketmoo_ds::min_norm", lib=_library)
def _(gram: Tensor, mask: Tensor, *, max_weight: float = 1.0, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return gram.new_empty(mask.shape), mask.new_empty(mask.shape[:1])


@torch.library.register_fake("bucketmoo_ds::combine", lib=_library)
def _(
    rows: list[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor, *, backend: str = "auto"
) -> None:
    return None


@torch.library.register_fake("bucketmoo_ds::resolve", lib=_library)
def _(
    rows: list[Tensor],
    mask: Tensor,
    spans: Tensor,
    cells: Tensor,
    out: Tensor,
    *,
    max_weight: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(rows)
    weights = rows[0].new_empty(mask.shape, dtype=torch.float64)
    gram = rows[0].new_empty((mask.shape[0], count, count), dtype=torch.float64)
    return gram, weights, mask.new_empty(mask.shape[:1])
