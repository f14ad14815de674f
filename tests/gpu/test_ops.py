"""Every backend that can run on this CUDA device, against the reference on the CPU: the same numbers, from rows that
never leave the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from draw import some
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.ops.backends import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none"),
]

BACKENDS = ("cuda", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of sqrt(G_ii G_jj): the bounds; float64 sums of 1e6 products, 1e6 * 2^-53 with a margin of 10.
GRAM_BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 1e-9}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
NUM_CELLS = 4


def every(number: int, names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """All combinations on every backend; that many are drawn for each, and the others are for the nightly list."""
    drawn = [some([(name, *each) for each in itertools.product(*values)], number) for name in BACKENDS]
    return pytest.mark.parametrize(f"backend, {names}", itertools.chain(*drawn), indirect=["backend"])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        return ops.choose_backend(name, "cuda")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@every(4, "dtype, count, alike", DTYPES, [1, 2, 3, 4, 8, 9, 16, 24, 40, 64], [True, False])
def test_gram(backend: str, generator: torch.Generator, dtype: torch.dtype, count: int, alike: bool) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike)
    expected = ops.gram(rows, spans, cells, NUM_CELLS, backend="reference")
    on_device = _on_device(rows)
    found = ops.gram(on_device, spans, cells, NUM_CELLS, backend=backend)
    assert found.is_cuda
    assert torch.equal(found, found.transpose(1, 2))
    assert torch.equal(found, ops.gram(on_device, spans, cells, NUM_CELLS, backend=backend))
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    scale = (norms[:, :, None] * norms[:, None, :]).clamp(min=1e-300)
    assert float(((found.cpu() - expected).abs() / scale).max()) <= GRAM_BOUND[dtype]


@every(2, "dtype, count", DTYPES, [2, 7, 21, 64])
def test_a_permutation_of_rows_permutes_the_gram_to_the_bit(
    backend: str, generator: torch.Generator, dtype: torch.dtype, count: int
) -> None:
    if backend == "reference":
        pytest.skip("holds for the fast backends only: the reference's products come from a matrix library")
    rows, spans, cells = _shard(generator, count, dtype, alike=True)
    order = torch.randperm(count, generator=generator).tolist()
    on_device = _on_device(rows)
    plain = ops.gram(on_device, spans, cells, NUM_CELLS, backend=backend)
    found = ops.gram([on_device[index] for index in order], spans, cells, NUM_CELLS, backend=backend)
    assert torch.equal(found, plain[:, order][:, :, order])


@every(2, "dtype, count", DTYPES, [3, 12, 40])
def test_what_is_not_finite_stays_in_its_row_and_column(
    backend: str, generator: torch.Generator, dtype: torch.dtype, count: int
) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike=True)
    longest = int(spans[:, 1].argmax())
    cell, bad = int(cells[longest]), count // 2
    rows[bad][int(spans[longest, 0]) + 17] = float("nan")
    found = ops.gram(_on_device(rows), spans, cells, NUM_CELLS, backend=backend).cpu()
    expected = torch.zeros(NUM_CELLS, count, count, dtype=torch.bool)
    expected[cell, bad] = expected[cell, :, bad] = True
    assert torch.equal(found.isnan(), expected)


@every(2, "dtype, count, gradients", DTYPES, [2, 8, 21], ["few", "many"])
def test_accumulate_gram(
    backend: str, generator: torch.Generator, dtype: torch.dtype, count: int, gradients: str
) -> None:
    rows, spans, cells = _shard(generator, count, torch.float32, alike=True)
    amount = 70 if gradients == "many" else count
    targets = torch.randint(1, count, (amount,), generator=generator).tolist()  # row 0 gets none
    targets[0], targets[1] = count - 1, -1
    fresh = [row == count - 1 for row in range(count)]
    rows[-1].fill_(float("nan"))
    scales = torch.rand(amount, generator=generator).tolist()
    incoming = torch.randn(amount, len(rows[0]), generator=generator).to(dtype)
    on_device = _on_device(rows)
    ops.accumulate_gram(rows, incoming, targets, scales, fresh, spans, cells, NUM_CELLS, backend="reference")
    found = ops.accumulate_gram(
        on_device, incoming.cuda(), targets, scales, fresh, spans, cells, NUM_CELLS, backend=backend
    )
    for row, wanted in zip(on_device, rows, strict=True):
        # To the bit but for float64 gradients, which the fast backends round to float32 first: 2^-24 each.
        exact = dtype != torch.float64
        torch.testing.assert_close(row.cpu(), wanted, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)
    assert torch.equal(found, ops.gram(on_device, spans, cells, NUM_CELLS, backend=backend))


@every(2, "count, cap", [2, 3, 16, 64], [1.0, 0.5])
def test_min_norm(backend: str, generator: torch.Generator, count: int, cap: float) -> None:
    rows = torch.randn(16, count, 2 * count, generator=generator, dtype=torch.float64)
    rows[8:] *= 10 ** (6 * torch.rand(8, count, 1, generator=generator, dtype=torch.float64) - 3)
    gram = rows @ rows.transpose(1, 2)
    gram = (gram + gram.transpose(1, 2)) / 2
    mask = torch.rand(16, count, generator=generator) < 0.9
    gram[3, 0] = gram[3, :, 0] = float("nan")
    mask[3, 0] = True
    expected, expected_finite = ops.min_norm(gram, mask, max_weight=cap, backend="reference")
    weights, finite = ops.min_norm(gram.cuda(), mask.cuda(), max_weight=cap, backend=backend)
    assert weights.is_cuda
    assert torch.equal(finite.cpu(), expected_finite)
    # Rows of full rank have one solution. Multipliers are right to 1e-12, and the cosines' condition is below 1e4.
    torch.testing.assert_close(weights.cpu(), expected, rtol=0, atol=1e-7)


@every(2, "dtype, out_dtype, alike", DTYPES, DTYPES, [True, False])
def test_combine(
    backend: str, generator: torch.Generator, dtype: torch.dtype, out_dtype: torch.dtype, alike: bool
) -> None:
    rows, spans, cells = _shard(generator, 6, dtype, alike)
    weights = torch.rand(NUM_CELLS, 6, generator=generator, dtype=torch.float64)
    weights[:, 1] = 0.0
    rows[1].fill_(float("nan"))
    exact = torch.empty(len(rows[0]), dtype=torch.float64)
    ops.combine(rows, weights, spans, cells, exact, backend="reference")
    magnitudes = torch.empty_like(exact)
    ops.combine([row.double().abs() for row in rows], weights, spans, cells, magnitudes, backend="reference")
    out = torch.full(exact.shape, float("nan"), dtype=out_dtype, device="cuda")
    ops.combine(_on_device(rows), weights.cuda(), spans, cells, out, backend=backend)
    # K + 2 roundings of the arithmetic, and one, or two from float64, to out's dtype; float16's subnormals.
    arithmetic = ROUNDING[torch.float64 if dtype == out_dtype == torch.float64 else torch.float32]
    bound = 8 * arithmetic * magnitudes + 2 * ROUNDING[out_dtype] * exact.abs() + 2.0**-24 * (out_dtype.itemsize == 2)
    assert ((out.cpu().double() - exact).abs() <= bound).all()


@every(2, "dtype, count", DTYPES, [2, 8, 24, 64])
def test_resolve(backend: str, generator: torch.Generator, dtype: torch.dtype, count: int) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike=True)
    mask = torch.rand(NUM_CELLS, count, generator=generator) < 0.8
    on_device = _on_device(rows)
    out, apart = (torch.full_like(on_device[0], float("nan")) for _ in range(2))
    gram, weights, finite = ops.resolve(on_device, mask.cuda(), spans, cells, out, max_weight=0.9, backend=backend)
    expected = ops.gram(rows, spans, cells, NUM_CELLS, backend="reference")
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    scale = (norms[:, :, None] * norms[:, None, :]).clamp(min=1e-300)
    assert float(((gram.cpu() - expected).abs() / scale).max()) <= GRAM_BOUND[dtype]
    alone, flags = ops.min_norm(gram, mask.cuda(), max_weight=0.9, backend=backend)
    assert torch.equal(weights, alone)
    assert torch.equal(finite, flags)
    ops.combine(on_device, weights, spans, cells, apart, backend=backend)
    assert torch.equal(out, apart)
    # In place, in the row that it reads.
    ops.resolve(on_device, mask.cuda(), spans, cells, on_device[0], max_weight=0.9, backend=backend)
    assert torch.equal(on_device[0], apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resolve_in_one_launch_gives_what_three_do(generator: torch.Generator, dtype: torch.dtype) -> None:
    reason = cuda.unavailable(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    rows, spans, cells = _shard(generator, 8, dtype, alike=True)
    on_device, mask = _on_device(rows), torch.ones(NUM_CELLS, 8, dtype=torch.bool, device="cuda")
    results = []
    for fused in (True, False):
        out = torch.empty_like(on_device[0])
        results.append((*cuda.resolve(on_device, mask, 1.0, spans, cells, out, fused=fused), out))
    # The launches may deal tiles differently, so that float64 sums differ in their last bits, and weights with them.
    for one, three in zip(*results, strict=True):
        tolerance = 4 * ROUNDING.get(one.dtype, 0.0) if one.dtype != torch.float64 else 1e-9
        torch.testing.assert_close(one, three, rtol=tolerance, atol=tolerance)


def _shard(
    generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of random alignment; segments of random length and cell, empty ones and gaps among them. The last cell has
    none."""
    lengths = [0, 1, 1, 17, 300, 40_000, 200_003, 64, 1, 9_997]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    spans, position = [], 0
    for index in order:
        position += int(torch.randint(4, (), generator=generator)) * 5
        spans.append([position, lengths[index]])
        position += lengths[index]
    shifts = torch.randint(16, (count,), generator=generator).tolist()
    rows = []
    for index in range(count):
        row = torch.empty(position + 7 + 16, dtype=dtype)[shifts[0 if alike else index] :][: position + 7]
        rows.append(row.copy_(torch.randn(position + 7, generator=generator)))
    return rows, torch.tensor(spans), torch.randint(NUM_CELLS - 1, (len(lengths),), generator=generator)


def _on_device(rows: list[Tensor]) -> list[Tensor]:
    """Copies of rows, each as far past a 16-byte boundary as on the CPU."""
    copies = []
    for row in rows:
        past = row.data_ptr() % 16 // row.element_size()
        copies.append(torch.empty(len(row) + past, dtype=row.dtype, device="cuda")[past:].copy_(row))
    return copies
