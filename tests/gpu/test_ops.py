"""The reference ops on a CUDA device: the same numbers as on the CPU, from rows that never leave the device."""

from __future__ import annotations

import pytest
import torch

from bucketmoo_ds import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none"),
]

SPANS = torch.tensor([[0, 40_000], [40_000, 1], [40_003, 9_997]])
BLOCKS = torch.tensor([1, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_and_combine_equal_the_cpu(dtype: torch.dtype) -> None:
    seed = int(torch.randint(2**31, ()))
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(50_000, generator=generator).to(dtype) for _ in range(5)]
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    on_device = [row.cuda() for row in rows]
    expected = ops.gram(rows, SPANS, BLOCKS, 2)
    found = ops.gram(on_device, SPANS, BLOCKS, 2)
    assert found.is_cuda
    # float64 sums of 5e4 products in another order: 5e4 * 2^-53 is 6e-12 of the sum of magnitudes.
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-11 * float(expected.max()), msg=f"seed {seed}")
    out = torch.full((50_000,), float("nan"))
    wanted = ops.combine(rows, weights, SPANS, BLOCKS, out)
    combined = ops.combine(on_device, weights, SPANS, BLOCKS, torch.full_like(out, float("nan"), device="cuda"))
    # One rounding to float32 of sums that differ in their last float64 bits.
    torch.testing.assert_close(combined.cpu(), wanted, rtol=2e-7, atol=1e-7, msg=f"seed {seed}")
