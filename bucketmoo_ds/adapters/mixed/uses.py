"""Uses of parameters: autograd functions that weight what a parameter gets, and nothing else.

A module whose output row depends on its input row alone gets the plain gradient of its output, and hands the plain
gradient of its input on. Its parameters get the gradient of the output's gradients times the weight of their row's
language: for `y = x W'`, `(diag(w) Y)' X` in place of `Y' X` (docs/theory.md).

Where Grams are taken, a use also returns the Gram of its groups' gradients: as the gradient of a leaf, the *tap* of the
parameter's block, so that autograd adds up the uses of a block, under checkpointing and in whichever wrapper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bucketmoo_ds.adapters.mixed import products
from bucketmoo_ds.adapters.mixed.passes import Pass, Placed
from bucketmoo_ds.adapters.mixed.products import Groups


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """What a use knows of a parameter in one forward pass.

    Args:
        table: `[B, K + 1]`: what the gradient of a row counts, by block and language; it is written when the first
            gradient comes. The last column, of rows without a language, is 0.
        block: the parameter's.
        parameter: its number in the plan.
        batch: the forward pass.
        placed: its rows.
    """

    table: Tensor
    block: int
    parameter: int
    batch: Pass
    placed: Placed

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Returns `[n]`, what each row's gradient is multiplied by."""
        self.batch.reached()
        return self.table[self.block].to(_wide(dtype))[self.placed.languages]

    def scale_of_group(self, dtype: torch.dtype) -> Tensor:
        """Returns `[2 K]`, the same by group."""
        self.batch.reached()
        return self.table[self.block, :-1].to(_wide(dtype)).repeat_interleave(2)

    def groups(self) -> Groups:
        """Returns the groups of the rows."""
        assert self.placed.groups is not None
        return self.placed.groups.read()

    def with_others(self, own: Tensor, held: Factors) -> Tensor:
        """Returns the Gram with that of all uses of the parameter whose backward has come: where it is used several
        times, its gradient is their sum."""
        if self.batch.uses.get(self.parameter, 1) == 1:
            return own
        others = self.batch.held.setdefault(self.parameter, [])
        for other in others:
            cross = _cross(held, other)
            own = own + cross + cross.mT
        others.append(held)
        return own


@dataclasses.dataclass(frozen=True)
class Factors:
    """What the gradient of a use is made of: `sum over r of left_r right_r'`, or of each group's finished gradient.

    Args:
        groups: of the rows.
        left: `[n, out]`, or `[n]` int64 where each row is 1 in one place, or `None`.
        right: `[n, in]`, or, without a left, the groups' gradients `[number, d]`.
    """

    groups: Groups
    left: Tensor | None
    right: Tensor


class Linear(torch.autograd.Function):
    """`y = x weight' + bias`, `x` `[..., in]`; `y = x weight + bias` where the weight lies the other way round. It is
    then kept as it is: a view of it would hold the memory that ZeRO-3 frees between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        turned: bool,
        uses: tuple[Use | None, Use | None],
        weight_tap: Tensor | None,
        bias_tap: Tensor | None,
    ) -> Tensor:
        """Args: the rows, the parameters, whether the weight is `[in, out]`, and of each parameter the use, and the tap
        where Grams are taken."""
        ctx.save_for_backward(x, weight)
        ctx.turned, ctx.uses = turned, uses
        return functional.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """See the module."""
        x, weight = ctx.saved_tensors
        weight = weight.t() if ctx.turned else weight
        of_weight, of_bias = ctx.uses
        y, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        into = (gradient @ weight) if ctx.needs_input_grad[0] else None
        weight_gradient = bias_gradient = weight_gram = bias_gram = None
        if ctx.needs_input_grad[1]:
            if ctx.needs_input_grad[5]:
                weight_gradient, weight_gram = _matrix(of_weight, y, rows)
            else:
                weight_gradient = products.weighted_product(y, rows, of_weight.scale(y.dtype))
            weight_gradient = weight_gradient.t() if ctx.turned else weight_gradient
        if ctx.needs_input_grad[2]:
            bias_gradient, bias_gram = _sum(of_bias, y, ctx.needs_input_grad[6])
        return into, weight_gradient, bias_gradient, None, None, weight_gram, bias_gram


class Embedding(torch.autograd.Function):
    """`y = weight[indices]`, `indices` `[...]` int64."""

    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: Tensor, padding: int | None, use: Use, tap: Tensor | None
    ) -> Tensor:
        """Args: the rows, the parameter, its index that gets no gradient, the use, and the tap."""
        ctx.save_for_backward(indices)
        ctx.use, ctx.padding, ctx.count = use, padding, weight.shape[0]
        return functional.embedding(indices, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """See the module."""
        (indices,) = ctx.saved_tensors
        use, padding = ctx.use, -1 if ctx.padding is None else ctx.padding
        y, places = gradient.reshape(-1, gradient.shape[-1]), indices.reshape(-1)
        weighted = products.scaled(y, use.scale(y.dtype))
        total = torch.ops.aten.embedding_dense_backward(weighted, places, ctx.count, padding, False)
        if not ctx.needs_input_grad[4]:
            return None, total, None, None, None
        groups = use.groups()
        counted = torch.where(places == padding, groups.number, groups.of_row)
        groups = groups._replace(of_row=counted)
        held = Factors(groups, places, y)
        gram = products.paired_alike(groups, len(y), lambda a, b: _dots(y[a], y[b]) * _same(places[a], places[b]))
        return None, total, None, None, use.with_others(gram, held)


class Elementwise(torch.autograd.Function):
    """A norm's output, `weight * unit + bias` in every row of `unit` `[..., d]`, which the module has made already."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        x: Tensor,
        unit: Callable[[Tensor], Tensor],
        uses: tuple[Use | None, Use | None],
        weight_tap: Tensor | None,
        bias_tap: Tensor | None,
    ) -> Tensor:
        """Args: the output, the parameters, the input, what makes `unit` of it, and of each parameter use and tap."""
        ctx.save_for_backward(x)
        ctx.unit, ctx.uses = unit, uses
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """See the module."""
        (x,) = ctx.saved_tensors
        of_weight, of_bias = ctx.uses
        y = gradient.reshape(-1, gradient.shape[-1])
        weight_gradient = bias_gradient = weight_gram = bias_gram = None
        if ctx.needs_input_grad[1]:
            unit = ctx.unit(x).reshape(y.shape)
            weight_gradient, weight_gram = _sum(of_weight, y * unit, ctx.needs_input_grad[6])
        if ctx.needs_input_grad[2]:
            bias_gradient, bias_gram = _sum(of_bias, y, ctx.needs_input_grad[7])
        return gradient, weight_gradient, bias_gradient, None, None, None, weight_gram, bias_gram


class RowWise(torch.autograd.Function):
    """The outputs of any module whose rows are independent, which it has made already; backward makes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        again: Callable[[], tuple[list[Tensor], list[Tensor]]],
        uses: Sequence[Use],
        shapes: Sequence[Placed],
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Args: what makes the outputs once more, of leaves that it returns too; the use of each parameter, the rows
        of each output, how many parameters there are; then the parameters, their taps, and the outputs."""
        ctx.again, ctx.uses, ctx.rows, ctx.count = again, uses, shapes, count
        ctx.grams = len(tensors) > count + len(shapes)
        return tuple(each.view_as(each) for each in tensors[len(tensors) - len(shapes) :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """See the module."""
        with torch.enable_grad():
            outputs, leaves = ctx.again()

        def pulled(scales: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor | None]:
            pairs = zip(gradients, scales, strict=True)
            scaled = [products.scaled(each.flatten(0, -2), scale).view_as(each) for each, scale in pairs]
            return list(torch.autograd.grad(outputs, parameters, scaled, retain_graph=True, allow_unused=True))

        found: list[Tensor | None] = []
        for use, leaf in zip(ctx.uses, leaves, strict=True):
            use.batch.reached()
            row = use.table[use.block].to(_wide(leaf.dtype))
            found += pulled([row[rows.languages] for rows in ctx.rows], [leaf])
        grams: list[Tensor | None] = []
        if ctx.grams:
            groups = [rows.groups.read() for rows in ctx.rows]
            number = groups[0].number
            present = sorted({group for each in groups for group, _, _ in each.present()})
            dtype = _wide(gradients[0].dtype)
            parts = [pulled([(each.of_row == group).to(dtype) for each in groups], leaves) for group in present]
            for index, (use, leaf) in enumerate(zip(ctx.uses, leaves, strict=True)):
                each = [leaf.new_zeros(leaf.numel()) if (of := part[index]) is None else of.flatten() for part in parts]
                gram = products.gram_of(each)
                whole = products.spread(gram, torch.tensor(present), number)
                if use.batch.uses.get(use.parameter, 1) > 1:
                    finished = leaf.new_zeros(number, leaf.numel()).index_copy_(
                        0, torch.tensor(present, device=leaf.device), torch.stack(each)
                    )
                    whole = use.with_others(whole, Factors(groups[0], None, finished))
                grams.append(whole)
        return (None, None, None, None, *found, *grams, *gradients)


def _matrix(use: Use, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted gradient of a matrix, and its Gram."""
    groups = use.groups()
    if products.pairs_are_cheaper(y, x, sum(size > 0 for size in groups.sizes[:-1])):
        weighted = products.weighted_product(y, x, use.scale(y.dtype))
        gram = products.paired_alike(groups, len(y), lambda a, b: _dots(y[a], y[b]) * _dots(x[a], x[b]))
    else:
        weighted, gram = products.of_products(y, x, groups, use.scale_of_group(y.dtype))
    return weighted, use.with_others(gram, Factors(groups, y, x))


def _sum(use: Use, rows: Tensor, takes_gram: bool) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of the rows' gradients, and its Gram."""
    wide = rows.to(_wide(rows.dtype))
    total = products.weighted_sum(wide, use.scale(rows.dtype)).to(rows.dtype)
    if not takes_gram:
        return total, None
    groups = use.groups()
    finished = products.sums(rows, groups)
    return total, use.with_others(_dots(finished, finished, torch.float64), Factors(groups, None, finished))


def _cross(one: Factors, other: Factors) -> Tensor:
    """The products of two uses' gradients, `[number, number]`."""
    if one.left is None or other.left is None:
        assert one.left is None and other.left is None, "coverage.of_model refuses such a matrix"
        return _dots(one.right, other.right, torch.float64)

    def pairs(some: slice) -> Tensor:
        assert one.left is not None and other.left is not None
        left, right = one.left[some], other.left
        if left.dim() == right.dim() == 1:
            there = _same(left, right)
        elif left.dim() == 1:
            there = right[:, left].mT
        elif right.dim() == 1:
            there = left[:, right]
        else:
            there = _dots(left, right)
        return there * _dots(one.right[some], other.right)

    return products.paired(one.groups, other.groups, len(one.right), pairs)


def _dots(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    wide = dtype or _wide(left.dtype)
    return left.to(wide) @ right.to(wide).mT


def _same(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(1) == right


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
