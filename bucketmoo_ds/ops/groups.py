"""The ops for more rows than a backend takes (`MAX_ROWS`): any backend's own, called with groups of rows.

The Gram is put together from those of pairs of groups, which costs about twice the products. The CPU's solver takes any
number of rows; a GPU's keeps them in a multiprocessor's memory, and leaves more to the readable one. What
`bucketmoo_ds.ops` promises holds for any number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from bucketmoo_ds.ops.backends import cpu
from bucketmoo_ds.ops.backends import min_norm as solver
from bucketmoo_ds.ops.backends.checks import MAX_ROWS


class Grouped:
    """Has the functions of a backend (`bucketmoo_ds.ops.backends`), and calls those of one."""

    def __init__(self, backend: ModuleType) -> None:
        self._backend = backend

    def gram(self, rows: Sequence[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> Tensor:
        """See `bucketmoo_ds.ops.gram`."""
        count = len(rows)
        total = rows[0].new_empty((num_cells, count, count), dtype=torch.float64)
        # All pairs have equally many rows, the last row several times where they do not come out even: backends add up
        # differently for different numbers of rows, and a permutation of the rows must permute the Gram to the bit.
        groups = -(-count // (MAX_ROWS // 2))
        size = -(-count // groups)
        padded = [*rows, *[rows[-1]] * (groups * size - count)]
        begins = range(0, count, size)
        for first, second in itertools.combinations(begins, 2):
            pair = [*padded[first : first + size], *padded[second : second + size]]
            part = self._backend.gram(pair, spans, cells, num_cells)
            for begin, i in ((first, 0), (second, size)):
                for other, j in ((first, 0), (second, size)):
                    target = total[:, begin : begin + size, other : other + size]
                    target.copy_(part[:, i : i + target.shape[1], j : j + target.shape[2]])
        return total

    def accumulate_gram(
        self,
        rows: Sequence[Tensor],
        incoming: Tensor,
        targets: Sequence[int],
        scales: Sequence[float],
        fresh: Sequence[bool],
        spans: Tensor,
        cells: Tensor,
        num_cells: int,
    ) -> Tensor:
        """See `bucketmoo_ds.ops.accumulate_gram`. Two passes: the Gram takes rows of two groups."""
        for begin in range(0, len(rows), MAX_ROWS):
            group = slice(begin, begin + MAX_ROWS)
            self._backend.accumulate_gram(
                rows[group],
                incoming,
                [target - begin if begin <= target < begin + MAX_ROWS else -1 for target in targets],
                scales,
                fresh[group],
                spans[:0],
                cells[:0],
                0,
            )
        return self.gram(rows, spans, cells, num_cells)

    def min_norm(self, gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
        """See `bucketmoo_ds.ops.min_norm`."""
        takes_any = self._backend if self._backend is cpu else solver
        weights, finite = takes_any.min_norm(gram, mask, max_weight)
        return weights, finite

    def combine(self, rows: Sequence[Tensor], weights: Tensor, spans: Tensor, cells: Tensor, out: Tensor) -> None:
        """See `bucketmoo_ds.ops.combine`. The groups' sums are added up in float64, and rounded once."""
        total = torch.zeros_like(out, dtype=torch.float64)
        part = torch.empty_like(total)
        for begin in range(0, len(rows), MAX_ROWS):
            group = slice(begin, begin + MAX_ROWS)
            self._backend.combine(rows[group], weights[:, group].contiguous(), spans, cells, part)
            total += part
        out.copy_(total)

    def resolve(
        self, rows: Sequence[Tensor], mask: Tensor, max_weight: float, spans: Tensor, cells: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `bucketmoo_ds.ops.resolve`."""
        grams = self.gram(rows, spans, cells, mask.shape[0])
        weights, finite = self.min_norm(grams, mask, max_weight)
        self.combine(rows, weights, spans, cells, out)
        return grams, weights, finite
