"""The row store: for every bucket, the rows of the languages that this window has seen so far, `[K, S]`; two a language
where Grams are crossed (`pipeline/halves.py`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from bucketmoo_ds.data.batch import Row
from bucketmoo_ds.transfer import pinned


class Claim(NamedTuple):
    """Rows `[S]` float32, and which of them are void: the first gradient overwrites such a row."""

    rows: list[Tensor]
    fresh: list[bool]


class RowStore:
    """Rows of this rank's shard of every bucket.

    A row is allocated when its language first comes and reused from window to window; the first gradient of a window
    overwrites it, so that nothing is ever filled with zeros.

    Args:
        storage: `float32`, `bfloat16` (rounded with every gradient that is added), or `host`: float32 in host memory,
            from where a row is fetched to be added to, and sent back; the host waits for neither.
    """

    def __init__(self, storage: str = "float32") -> None:
        self._dtype = torch.bfloat16 if storage == "bfloat16" else torch.float32
        self._on_host = storage == "host"
        self._rows: dict[tuple[int, Row], Tensor] = {}
        self._filled: set[tuple[int, Row]] = set()

    @property
    def is_float32_on_device(self) -> bool:
        """Whether the rows are as kernels add gradients to them, so that `claim` may be used."""
        return self._dtype == torch.float32 and not self._on_host

    def add(self, bucket: int, of: Row, gradient: Tensor, scale: float) -> None:
        """Adds `scale * gradient` (`[S]`, any floating dtype) to a row."""
        key = (bucket, of)
        row, fresh = self._row(key, gradient), key not in self._filled
        self._filled.add(key)
        here = row if row.device == gradient.device else torch.empty_like(row, device=gradient.device)
        if fresh:
            here.copy_(gradient)
            if scale != 1.0:
                here.mul_(scale)
        else:
            if here is not row:
                here.copy_(row, non_blocking=True)
            here.add_(gradient, alpha=scale)
        if here is not row:
            row.copy_(here, non_blocking=True)

    def claim(self, bucket: int, rows: list[Row], receiving: Collection[Row], like: Tensor) -> Claim:
        """Hands rows to a caller who now adds a gradient `like` this one to each of `receiving`.

        Raises:
            KeyError: one that receives nothing has not been added to in this window.
        """
        fresh = [row in receiving and (bucket, row) not in self._filled for row in rows]
        for row in receiving:
            key = (bucket, row)
            self._filled.add(key)
            self._row(key, like)
        return Claim(self.rows(bucket, rows), fresh)

    def rows(self, bucket: int, rows: list[Row]) -> list[Tensor]:
        """Returns rows `[S]` where they are stored; each must have been added to in this window."""
        missing = [row for row in rows if (bucket, row) not in self._filled]
        if missing:
            raise KeyError(f"bucket {bucket} has no row of language {missing[0][0]} in this window")
        return [self._rows[bucket, row] for row in rows]

    def _row(self, key: tuple[int, Row], like: Tensor) -> Tensor:
        if key not in self._rows:
            away = self._on_host and like.device.type != "cpu"
            self._rows[key] = (
                pinned(like.shape, self._dtype)
                if away
                else torch.empty(like.shape, dtype=self._dtype, device=like.device)
            )
        return self._rows[key]

    def clear(self) -> None:
        """Forgets the window; the memory is kept for the next one."""
        self._filled.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows allocated so far."""
        return sum(row.nbytes for row in self._rows.values())
