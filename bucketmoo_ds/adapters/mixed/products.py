"""Products of the rows of a micro-batch: the weighted gradient of a matrix, and the Gram of its gradients by group.

A *group* is one half of what a language has in a micro-batch. With the rows x_r that go into a matrix and the gradients
y_r of what comes out, `[n, in]` and `[n, out]`, the gradient of group g is

    G_g = sum over r in g of y_r x_r'        [out, in].

Its Gram is taken either of these products, or pair by pair of rows, for

    <G_g, G_h> = sum over r in g, s in h of (x_r . x_s) (y_r . y_s),

whichever is cheaper. Nothing of the size of all groups' gradients outlives a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bucketmoo_ds import ops

# Elements of the products, or of the pairs, that are held at once; on a CPU, of the products no more than its caches
# keep.
AT_ONCE = 1 << 24
CACHED = 1 << 20
# Rows on the left at once, where both sides are the same rows, so that half of all pairs will do; fewer make a slow
# product.
SLICE = 64
# Rows that a weighted sum adds one after the other.
ROWS_A_PRODUCT = 16
# An operation of a Gram takes as long as this many of a large product, and so does the way of an element through
# memory. Measured on a CPU.
OF_GRAM, OF_MEMORY = 2, 150


class Groups(NamedTuple):
    """Which group each of n rows belongs to.

    Args:
        number: how many groups there are; a row of none has this number.
        of_row: `[n]` int64.
        order: `[n]` int64: the rows sorted by group.
        sizes: rows of each group, of none last; on the host.
    """

    number: int
    of_row: Tensor
    order: Tensor
    sizes: Sequence[int]

    def present(self) -> list[tuple[int, int, int]]:
        """Returns the groups that have rows: their numbers, and their first and last place in the order."""
        found, start = [], 0
        for group, size in enumerate(self.sizes[: self.number]):
            if size:
                found.append((group, start, start + size))
            start += size
        return found


def scaled(rows: Tensor, scale: Tensor) -> Tensor:
    """Returns `rows[r] * scale[r]`, multiplied in the scale's precision and rounded once."""
    return (rows * scale.view(-1, *(1,) * (rows.dim() - 1))).to(rows.dtype)


def weighted_sum(rows: Tensor, scale: Tensor) -> Tensor:
    """Returns `sum over r of scale_r rows_r`, `[d]` of `[n, d]` and `[n]`: products of a few rows, and their sum. One
    product adds row after row, which is tens of times less accurate for thousands of rows, or for equal ones; a sum of
    scaled rows takes several times as long."""
    whole = len(rows) - len(rows) % ROWS_A_PRODUCT
    few = scale[:whole].view(-1, 1, ROWS_A_PRODUCT), rows[:whole].reshape(-1, ROWS_A_PRODUCT, rows.shape[1])
    return torch.bmm(*few).sum((0, 1)) + scale[whole:] @ rows[whole:]


def weighted_product(y: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Returns `sum over r of scale_r y_r x_r'`, `[out, in]`: one product, and one pass over the narrower side."""
    return scaled(y, scale).mT @ x if y.shape[1] < x.shape[1] else y.mT @ scaled(x, scale)


def pairs_are_cheaper(y: Tensor, x: Tensor, groups: int) -> bool:
    """Whether the pairs of rows cost less than the products and their pairs of groups."""
    rows, out, into = len(y), y.shape[1], x.shape[1]
    return rows**2 * (out + into + OF_MEMORY) < groups * (OF_GRAM * groups + OF_MEMORY) * out * into


def of_products(y: Tensor, x: Tensor, groups: Groups, scale_of_group: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weighted gradient `[out, in]`, and the Gram `[number, number]` float64 of the groups' gradients.

    Args:
        y, x: `[n, out]` and `[n, in]` of one dtype.
        groups: of the rows.
        scale_of_group: `[number]`, what each group's gradient is multiplied by in the weighted one.
    """
    present = groups.present()
    y, x = y[groups.order], x[groups.order]
    out, into = y.shape[1], x.shape[1]
    weighted = y.new_zeros(out, into)
    gram = y.new_zeros(groups.number, groups.number, dtype=torch.float64)
    if not present:
        return weighted, gram
    numbers = torch.tensor([group for group, _, _ in present])
    scale = scale_of_group[numbers.to(scale_of_group.device)]
    at_once = min(AT_ONCE, CACHED) if y.device.type == "cpu" else AT_ONCE
    columns = min(max(at_once // (len(present) * into), 1), out)
    held = y.new_empty(len(present) * columns * into)
    for first in range(0, out, columns):
        part = y[:, first : first + columns]
        products = held[: len(present) * part.shape[1] * into].view(len(present), -1)
        for product, (_, start, stop) in zip(products, present, strict=True):
            torch.mm(part[start:stop].mT, x[start:stop], out=product.view(-1, into))
        weighted[first : first + columns] = (scale @ products.to(scale.dtype)).view(-1, into)
        gram += spread(gram_of(products.unbind()), numbers, groups.number)
    return weighted, gram


def gram_of(rows: Sequence[Tensor]) -> Tensor:
    """Returns the Gram `[K, K]` float64 of rows `[S]`."""
    spans, cells = torch.tensor([[0, rows[0].numel()]]), torch.zeros(1, dtype=torch.int64)
    return ops.gram(rows, spans, cells, 1)[0]


def spread(gram: Tensor, numbers: Tensor, total: int) -> Tensor:
    """Returns the Gram of all `total` groups, of which these numbers have rows."""
    whole = gram.new_zeros(total, total)
    there = numbers.to(gram.device)
    whole[there[:, None], there] = gram
    return whole


def sums(rows: Tensor, groups: Groups) -> Tensor:
    """Returns the sum of the rows `[n, d]` of each group, `[number, d]`, float32 or more."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(groups.number + 1, rows.shape[1], dtype=wide)
    return total.index_add_(0, groups.of_row, rows.to(wide))[: groups.number]


def paired_alike(groups: Groups, count: int, pairs: Callable[[slice, slice], Tensor]) -> Tensor:
    """Returns, for groups g and h, the sum of `pairs` over the rows of g and of h.

    Args:
        groups: of `count` rows.
        pairs: for some rows, and some others, their products `[c, m]`, the same whichever come first.
    """
    members = _members(groups)
    gram = members.new_zeros(groups.number, groups.number)
    step = max(min(AT_ONCE // max(count, 1), max(count // 8, SLICE)), 1)
    for first in range(0, count, step):
        rows, size = slice(first, first + step), min(step, count - first)
        found = pairs(rows, slice(first, count)).to(torch.float64)
        gram += members[rows].mT @ found[:, :size] @ members[rows]
        beyond = members[rows].mT @ (found[:, size:] @ members[first + size :])
        gram += beyond + beyond.mT
    return gram


def paired(left: Groups, right: Groups, count: int, pairs: Callable[[slice], Tensor]) -> Tensor:
    """Returns, for groups g and h, the sum of `pairs` over the rows of g on the left and of h on the right.

    Args:
        left, right: of `count` and of m rows.
        pairs: for some rows on the left the products `[c, m]` with all on the right.
    """
    ends, starts = _members(left), _members(right)
    gram = ends.new_zeros(left.number, right.number)
    step = max(AT_ONCE // max(len(right.of_row), 1), 1)
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        gram += ends[rows].mT @ (pairs(rows).to(torch.float64) @ starts)
    return gram


def _members(groups: Groups) -> Tensor:
    """`[n, number]` float64: 1 where a row belongs to a group."""
    each = torch.arange(groups.number, device=groups.of_row.device)
    return (groups.of_row.unsqueeze(-1) == each).to(torch.float64)
