"""The row store: for every bucket, the rows of the languages that this window has seen so far, `[K, S]`."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

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
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._filled: set[tuple[int, int]] = set()

    @property
    def is_float32_on_device(self) -> bool:
        """Whether the rows are as kernels add gradients to them, so that `claim` may be used."""
        return self._dtype == torch.float32 and not self._on_host

    def add(self, bucket: int, language: int, gradient: Tensor, scale: float) -> None:
        """Adds `scale * gradient` (`[S]`, any floating dtype) to a row."""
        key = (bucket, language)
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

    def claim(self, bucket: int, languages: list[int], receiving: Collection[int], like: Tensor) -> Claim:
        """Hands the rows of the languages to a caller who now adds a gradient `like` this one to each of `receiving`.

        Raises:
            KeyError: a language that receives nothing has not been added in this window.
        """
        fresh = [language in receiving and (bucket, language) not in self._filled for language in languages]
        for language in receiving:
            key = (bucket, language)
            self._filled.add(key)
            self._row(key, like)
        return Claim(self.rows(bucket, languages), fresh)

    def rows(self, bucket: int, languages: list[int]) -> list[Tensor]:
        """Returns the rows `[S]` of the languages where they are stored; each must have been added in this window."""
        missing = [language for language in languages if (bucket, language) not in self._filled]
        if missing:
            raise KeyError(f"bucket {bucket} has no row of language {missing[0]} in this window")
        return [self._rows[bucket, language] for language in languages]

    def _row(self, key: tuple[int, int], like: Tensor) -> Tensor:
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
