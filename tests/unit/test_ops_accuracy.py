"""Accuracy of the CPU backend's Gram at 1e7 elements, where a careless float32 sum has lost three digits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bucketmoo_ds import ops

SIZE = 10_000_000
# Float32 rows up to 16, float16 rows: float64 sums. More float32 rows have chains of 16 - log2(lanes) fused
# multiply-adds and a tree over the lanes: 16 roundings in float32 at most, 16 * 2^-24 = 9.6e-7 of
# sum |a b| <= sqrt(G_ii G_jj), for any length. Bfloat16 rows have 32 roundings: 1.9e-6, where 4e-6 is asked for
# (csrc/cpu/kernels_impl.h).
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
# The last is the shortest way to the kernels that add up float32 rows in float32.
CASES = [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4), (torch.float32, 17)]


class Grams(NamedTuple):
    rows: list[Tensor]
    found: Tensor  # [4, 4]
    expected: Tensor  # [4, 4]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} K={case[1]}")
def grams(request: pytest.FixtureRequest) -> Grams:
    """Of four rows, of which the first two differ by 1e-3 of their norm (or by their rounding, where that is more)."""
    reason = ops.why_unavailable("cpu")
    if reason:
        pytest.skip(reason)
    dtype, count = request.param
    seed = torch.seed()
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    # A common mean: sums grow with the length instead of averaging out, and errors of one sign with them.
    first = torch.randn(SIZE, generator=generator).add_(1.0)
    near = torch.randn(SIZE, generator=generator).mul_(1e-3 * float(first.norm()) / SIZE**0.5).add_(first)
    other = torch.randn(SIZE, generator=generator).add_(1.0)
    rows = [row.to(dtype) for row in (first, near, other, first.neg())]
    segment = torch.tensor([[0, SIZE]]), torch.tensor([0])
    expected = ops.gram(rows, *segment, 1, backend="reference")[0]
    found = ops.gram(rows + rows[:1] * (count - 4), *segment, 1, backend="cpu")[0, :4, :4]
    return Grams(rows, found, expected)


def test_entries(grams: Grams) -> None:
    norms = grams.expected.diagonal().sqrt()
    bound = BOUND[grams.rows[0].dtype] * torch.outer(norms, norms)
    assert ((grams.found - grams.expected).abs() <= bound).all()


def test_near_parallel_rows_keep_their_difference(grams: Grams) -> None:
    """|a - b|^2 = G_aa - 2 G_ab + G_bb is 1e-6 of each of these.

    A thousandth of it is 1e-9 of them, which the bounds of the entries alone do not give: errors of the chains must
    have either sign equally often, so that they average out, or be added up in float64. Chains of squares of bfloat16
    numbers round down more often than up, by 1.5e-8 of the row's own entry, at any length: 7e-3 of the difference was
    seen, and docs/kernels.md states 2e-2.
    """
    first, near = (row.double() for row in grams.rows[:2])
    exact = float((first - near).square().sum())
    found = float(grams.found[0, 0] - 2 * grams.found[0, 1] + grams.found[1, 1])
    kept = 2e-2 if grams.rows[0].dtype == torch.bfloat16 else 1e-3
    assert abs(found - exact) <= kept * exact
