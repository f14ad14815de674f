"""`gram` and `combine` over the segments of a shard: tensors only, one signature, several backends.

Rows are a list and are never stacked: the K rows of a shard lie where the exchange or the store put them.
A backend is a module of `bucketmoo_ds.backends` with functions of the same two signatures.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

BACKENDS = ("reference",)
ENVIRONMENT = "BUCKETMOO_BACKEND"


def gram(rows: Sequence[Tensor], spans: Tensor, blocks: Tensor, num_blocks: int, *, backend: str = "auto") -> Tensor:
    """Returns the partial Grams of a shard's segments, added up by block.

    Args:
        rows: K tensors `[S]` of one dtype (float32, bfloat16, float16 or float64).
        spans: `[n, 2]` int64 on the CPU: start and length of each segment, in elements, ascending, none overlapping.
        blocks: `[n]` int64 on the CPU: the block of each segment.
        num_blocks: B.

    Returns:
        `[B, K, K]` float64 on the rows' device, symmetric to the bit.
    """
    result: Tensor = _module(backend).gram(rows, spans, blocks, num_blocks)
    return result


def combine(
    rows: Sequence[Tensor], weights: Tensor, spans: Tensor, blocks: Tensor, out: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Writes the weighted sum of the rows of every segment into `out`; elements outside of any segment become 0.

    A weight of exactly 0 leaves its row out, so that a row that is not finite does no harm.

    Args:
        rows: K tensors `[S]`.
        weights: `[B, K]` float64.
        spans, blocks: as in `gram`.
        out: `[S]`; it may be one of the rows.

    Returns:
        `out`.
    """
    result: Tensor = _module(backend).combine(rows, weights, spans, blocks, out)
    return result


def choose_backend(setting: str = "auto") -> str:
    """Returns the name of the backend that will run.

    The environment variable `BUCKETMOO_BACKEND` wins over the setting. An explicit choice is honoured or raises.

    Raises:
        ConfigError: the name is not known.
    """
    source, name = f"{ENVIRONMENT}", os.environ.get(ENVIRONMENT, "")
    if not name:
        source, name = "bucket_moo.backend", setting
    if name == "auto":
        return BACKENDS[0]
    if name not in BACKENDS:
        known = ("auto", *BACKENDS)
        raise ConfigError(f'{source} = "{name}": unknown, expected {one_of(known)}{did_you_mean(name, known)}')
    return name


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"bucketmoo_ds.backends.{choose_backend(backend)}")
