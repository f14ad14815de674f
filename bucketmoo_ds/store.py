"""The row store: for every bucket, the rows of the languages that this window has seen so far, `[K, S]` in float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class Claim(NamedTuple):
    """Rows `[S]` float32, and which of them are void: the first gradient overwrites such a row."""

    rows: list[Tensor]
    fresh: list[bool]


class RowStore:
    """Rows of this rank's shard of every bucket.

    A row is allocated when its language first comes and reused from window to window; the first gradient of a window
    overwrites it, so that nothing is ever filled with zeros.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._filled: set[tuple[int, int]] = set()

    def add(self, bucket: int, language: int, gradient: Tensor, scale: float) -> None:
        """Adds `scale * gradient` (`[S]`, any floating dtype) to a row."""
        key = (bucket, language)
        if key in self._filled:
            self._rows[key].add_(gradient, alpha=scale)
            return
        self._filled.add(key)
        if key not in self._rows:
            self._rows[key] = torch.empty_like(gradient, dtype=torch.float32)
        row = self._rows[key].copy_(gradient)
        if scale != 1.0:
            row.mul_(scale)

    def claim(self, bucket: int, languages: list[int], receiving: Collection[int], like: Tensor) -> Claim:
        """Hands the rows of the languages to a caller who now adds a gradient `like` this one to each of `receiving`.

        Raises:
            KeyError: a language that receives nothing has not been added in this window.
        """
        fresh = [language in receiving and (bucket, language) not in self._filled for language in languages]
        for language in receiving:
            key = (bucket, language)
            self._filled.add(key)
            if key not in self._rows:
                self._rows[key] = torch.empty_like(like, dtype=torch.float32)
        return Claim(self.rows(bucket, languages), fresh)

    def rows(self, bucket: int, languages: list[int]) -> list[Tensor]:
        """Returns the rows `[S]` of the languages, each of which must have been added in this window."""
        missing = [language for language in languages if (bucket, language) not in self._filled]
        if missing:
            raise KeyError(f"bucket {bucket} has no row of language {missing[0]} in this window")
        return [self._rows[bucket, language] for language in languages]

    def clear(self) -> None:
        """Forgets the window; the memory is kept for the next one."""
        self._filled.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows allocated so far."""
        return sum(row.nbytes for row in self._rows.values())
