"""`gram`, `accumulate_gram`, `combine` and `resolve` by Triton's interpreter; `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from draw import some
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.ops.backends import reference
from bucketmoo_ds.ops.backends import triton as backend

CELLS = 4  # of which the last one has no segments
# Of sqrt(G_ii G_jj): what kernels/gram.py states for its chains; float64 sums of 5e3 products, 5e3 * 2^-53.
GRAM_BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 1e-12}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# Both ways to multiply, padded and not, rows that lie alike or not; the interpreter takes up to a second for each.
CASES = [
    (1, torch.bfloat16, True), (2, torch.float32, True), (2, torch.bfloat16, False), (3, torch.float16, True),
    (3, torch.float64, False), (8, torch.bfloat16, True), (8, torch.float32, False), (17, torch.float32, True),
    (17, torch.bfloat16, False), (17, torch.float64, True), (64, torch.bfloat16, True), (64, torch.float32, False),
]  # fmt: skip


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "dtype", "alike"), some(CASES, 1))
def test_gram(generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike)
    found = backend.gram(rows, spans, cells, CELLS)
    expected = reference.gram(rows, spans, cells, CELLS)
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    scale = (norms[:, :, None] * norms[:, None, :]).clamp(min=1e-300)
    assert float(((found - expected).abs() / scale).max()) <= GRAM_BOUND[dtype]
    assert torch.equal(found, found.mT)
    assert torch.equal(found[-1], torch.zeros(count, count, dtype=torch.float64)), "a cell without segments"


@pytest.mark.parametrize(("count", "dtype", "alike"), some([
    (2, torch.float64, True), (3, torch.float32, True), (6, torch.bfloat16, False), (17, torch.float32, False),
    (17, torch.float16, True),
], 1))  # fmt: skip
def test_a_permutation_of_rows_permutes_the_gram_to_the_bit(
    generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool
) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike)
    order = torch.randperm(count, generator=generator)
    found = backend.gram([rows[index] for index in order], spans, cells, CELLS)
    assert torch.equal(found, backend.gram(rows, spans, cells, CELLS)[:, order][:, :, order])


@pytest.mark.parametrize(("count", "dtype", "poison"), some([
    (3, torch.float32, float("nan")), (4, torch.bfloat16, float("inf")), (12, torch.bfloat16, float("nan")),
], 1))  # fmt: skip
def test_what_is_not_finite_stays_in_its_row_and_column(
    generator: torch.Generator, count: int, dtype: torch.dtype, poison: float
) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike=True)
    bad = int(torch.randint(count, (), generator=generator))
    clean = backend.gram(rows, spans, cells, CELLS)
    longest = int(spans[:, 1].argmax())
    start, length = spans[longest].tolist()
    rows[bad][start + length // 2] = poison
    found = backend.gram(rows, spans, cells, CELLS)
    cell = int(cells[longest])
    assert not found[cell, bad].isfinite().any()
    assert not found[cell, :, bad].isfinite().any()
    found[cell, bad] = found[cell, :, bad] = clean[cell, bad] = clean[cell, :, bad] = 0.0
    assert torch.equal(found, clean)


def test_what_lies_between_segments_is_not_read(generator: torch.Generator) -> None:
    rows, spans, cells = _shard(generator, 3, torch.float32, alike=True)
    before = backend.gram(rows, spans, cells, CELLS)
    outside = torch.ones(len(rows[0]), dtype=torch.bool)
    for start, length in spans.tolist():
        outside[start : start + length] = False
    for row in rows:
        row[outside] = float("nan")
    assert torch.equal(backend.gram(rows, spans, cells, CELLS), before)


def test_near_parallel_rows_keep_their_difference(generator: torch.Generator) -> None:
    base = torch.randn(30_000, generator=generator)
    rows = [base, base + 1e-3 * torch.randn(30_000, generator=generator)]
    gram = backend.gram(rows, torch.tensor([[0, 30_000]]), torch.tensor([0]), 1)[0]
    expected = float((rows[0].double() - rows[1].double()).square().sum())
    # The 1e-3 at 1e7 elements. Errors of chains have random signs: their share of the sum falls with the square
    # root of its length, so that 3e4 elements stand for 1e7 at sqrt(1e7 / 3e4) = 18 times the tolerance.
    assert float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]) == pytest.approx(expected, rel=1.8e-2)


@pytest.mark.parametrize(("count", "dtype", "alike", "incoming_alike"), some([
    (2, torch.float32, True, True), (3, torch.bfloat16, True, False), (3, torch.float16, False, False),
    (17, torch.bfloat16, True, True), (4, torch.float64, True, True),
], 1))  # fmt: skip
def test_accumulate_gram(
    generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool, incoming_alike: bool
) -> None:
    rows, spans, cells = _shard(generator, count, torch.float32, alike)
    given = [*range(3, count), 1, 0, -1, 1]  # row 1 gets two, row 2 none
    shift = (rows[0].data_ptr() // 4) % 4
    # As far apart as a multiple of 16 bytes, or not.
    apart = -len(rows[0]) % 16 + (0 if incoming_alike else 3)
    memory = _row(generator, len(given) * (len(rows[0]) + apart), dtype, shift)
    incoming = memory.view(len(given), -1)[:, : len(rows[0])]
    scales = torch.rand(len(given), generator=generator).add(0.1).tolist()
    fresh = [row == 1 for row in range(count)]
    expected = [row.clone() for row in rows]
    rows[1].fill_(float("nan"))
    reference.accumulate_gram(
        expected, incoming, given, scales, fresh, spans, cells, CELLS
    )
    gram = backend.accumulate_gram(rows, incoming, given, scales, fresh, spans, cells, CELLS)
    for row, wanted in zip(rows, expected, strict=True):
        if dtype == torch.float64:
            # The reference rounds once, the kernel also rounds the gradient to float32: of sums of two such products.
            torch.testing.assert_close(row, wanted, rtol=2e-7, atol=1e-6)
        else:
            assert torch.equal(row, wanted)
    assert torch.equal(gram, backend.gram(rows, spans, cells, CELLS))


@pytest.mark.parametrize(("count", "dtype", "out_dtype", "alike"), some([
    (1, torch.float32, torch.bfloat16, True), (3, torch.bfloat16, torch.float32, True),
    (3, torch.bfloat16, torch.bfloat16, False), (8, torch.float16, torch.float16, True),
    (17, torch.float64, torch.float16, True), (2, torch.float64, torch.float64, False),
    (24, torch.bfloat16, torch.bfloat16, True), (9, torch.float32, torch.float64, True),
], 1))  # fmt: skip
def test_combine(
    generator: torch.Generator, count: int, dtype: torch.dtype, out_dtype: torch.dtype, alike: bool
) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike)
    weights = torch.rand(CELLS, count, generator=generator, dtype=torch.float64)
    if count > 1:
        weights[:, 1] = 0.0
        rows[1].fill_(float("nan"))
    out = torch.full_like(rows[0], float("nan"), dtype=out_dtype)
    backend.combine(rows, weights, spans, cells, out)
    exact = torch.empty_like(out, dtype=torch.float64)
    reference.combine(rows, weights, spans, cells, exact)
    magnitudes = torch.empty_like(exact)
    reference.combine([row.double().abs() for row in rows], weights, spans, cells, magnitudes)
    # K + 2 roundings of the arithmetic (the weight's own, each sum), and one, or two from float64, to out's dtype.
    arithmetic = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    bound = (count + 2) * arithmetic * magnitudes + 2 * ROUNDING[out_dtype] * exact.abs()
    smallest = 2.0**-24 if out_dtype == torch.float16 else 1e-40
    assert ((out.double() - exact).abs() <= bound + smallest).all()
    inside = torch.zeros(len(out), dtype=torch.bool)
    for start, length in spans.tolist():
        inside[start : start + length] = True
    assert (out[~inside] == 0.0).all()


@pytest.mark.parametrize("dtype", some([(torch.float32,), (torch.bfloat16,)], 1))
def test_out_may_be_a_row(generator: torch.Generator, dtype: torch.dtype) -> None:
    rows, spans, cells = _shard(generator, 5, dtype, alike=True)
    weights = torch.rand(CELLS, 5, generator=generator, dtype=torch.float64)
    apart = torch.full_like(rows[2], float("nan"))
    backend.combine(rows, weights, spans, cells, apart)
    backend.combine(rows, weights, spans, cells, rows[2])
    assert torch.equal(rows[2], apart)


@pytest.mark.parametrize(("count", "dtype"), [
    *some([(2, torch.bfloat16), (3, torch.float32)], 1),
    pytest.param(17, torch.float32, marks=pytest.mark.nightly),  # takes as long as all others together
])  # fmt: skip
def test_resolve_is_gram_solve_and_combine(generator: torch.Generator, count: int, dtype: torch.dtype) -> None:
    rows, spans, cells = _shard(generator, count, dtype, alike=True)
    mask = torch.rand(CELLS, count, generator=generator) < 0.8
    out, apart = (torch.full_like(rows[0], float("nan")) for _ in range(2))
    gram, weights, finite = ops.resolve(rows, mask, spans, cells, out, max_weight=0.7, backend="triton")
    assert torch.equal(gram, backend.gram(rows, spans, cells, CELLS))
    expected, flags = reference.min_norm(gram, mask, 0.7)
    assert torch.equal(finite, flags)
    # Blocks of few elements have dependent rows: not the weights, but what they make must agree, to the root of what
    # the solvers' ridge of 1e-13 may move its square by.
    moved = ((weights - expected) * (gram @ (weights - expected).unsqueeze(-1)).squeeze(-1)).sum(-1)
    assert (moved <= 1e-12 * gram.diagonal(dim1=1, dim2=2).sum(-1)).all()
    backend.combine(rows, weights, spans, cells, apart)
    assert torch.equal(out, apart)


@pytest.mark.parametrize("elements", [0, 7])
def test_no_elements_and_no_segments(elements: int) -> None:
    rows = [torch.ones(elements), torch.ones(elements)]
    spans, cells = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert torch.equal(backend.gram(rows, spans, cells, 3), torch.zeros(3, 2, 2, dtype=torch.float64))
    assert backend.gram(rows, spans, cells, 0).shape == (0, 2, 2)
    out = torch.full((elements,), float("nan"))
    backend.combine(rows, torch.ones(3, 2, dtype=torch.float64), spans, cells, out)
    assert torch.equal(out, torch.zeros(elements))


def _shard(
    generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of random alignment, alike or not; segments of random length, some empty, some of one element, of cells 0
    to 2 in any order, and gaps."""
    lengths = [0, 1, 17, 300, 1700 if count < 9 else 600, 64, 1]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    spans, position = [], 0
    for index in order:
        position += int(torch.randint(4, (), generator=generator)) * 5
        spans.append([position, lengths[index]])
        position += lengths[index]
    elements = position + int(torch.randint(40, (), generator=generator))
    shifts = torch.randint(16, (count,), generator=generator)
    shifts[1:2] = shifts[0] + 1  # so that they surely differ
    rows = [_row(generator, elements, dtype, int(shifts[0 if alike else index])) for index in range(count)]
    return rows, torch.tensor(spans), torch.randint(CELLS - 1, (len(lengths),), generator=generator)


def _row(generator: torch.Generator, elements: int, dtype: torch.dtype, shift: int) -> Tensor:
    values = torch.randn(elements, generator=generator)
    row = torch.empty(elements + shift, dtype=dtype)[shift:]
    return row.copy_(values)
