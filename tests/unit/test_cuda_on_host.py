"""The CUDA kernels where no GPU is (`emulated_cuda`), held against the reference backend, but for `min_norm`, to which
`test_min_norm.py` belongs; and that a barrier which is missing shows. What only a GPU can show stands in tests/gpu."""

from __future__ import annotations

import ctypes
import random
import shutil

import pytest
import torch
from draw import SEED
from torch import Tensor
from unit.emulated_cuda import DTYPES, Kernels, library

from bucketmoo_ds.ops.backends import reference
from bucketmoo_ds.ops.backends.tiles import tile_table

# Of sqrt(G_ii G_jj): what gram.cuh states for its chains; float64 sums of 1e4 products, 1e4 * 2^-53.
GRAM_BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 2e-12}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the emulated kernels")


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(order=random.Random(f"{SEED}/{request.node.nodeid}").getrandbits(31))


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


GRAM_CASES = [
    *((count, torch.bfloat16) for count in (1, 2, 3, 4, 7, 8, 13, 29, 61, 64)),
    *((count, torch.float16) for count in (2, 16, 33)),
    *((count, torch.float32) for count in (1, 2, 3, 8, 9, 17, 64)),
    *((count, torch.float64) for count in (1, 6, 64)),
]


# Rows that lie alike and not; of many rows, which take seconds, the one or the other.
@pytest.mark.parametrize(
    ("count", "dtype", "alike"),
    [
        (*case, alike)
        for case in GRAM_CASES
        for alike in ([True, False] if case[0] < 29 else [random.Random(f"{SEED} {case}").random() < 0.5])
    ],
)
def test_gram(kernels: Kernels, generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool) -> None:
    rows, spans, blocks = _shard(generator, count, dtype, alike)
    found = kernels.gram(rows, spans, blocks, 4)
    expected = reference.gram(rows, spans, blocks, 4)
    assert _largest_error(found, expected) <= GRAM_BOUND[dtype]
    assert torch.equal(found, found.transpose(1, 2))
    assert torch.equal(found, kernels.gram(rows, spans, blocks, 4))
    assert torch.equal(found[3], torch.zeros(count, count, dtype=torch.float64)), "a block without segments"


@pytest.mark.parametrize(
    ("count", "dtype"), [(3, torch.float32), (8, torch.float32), (19, torch.float32), (4, torch.bfloat16),
                         (31, torch.float16), (40, torch.bfloat16), (5, torch.float64)]
)  # fmt: skip
def test_a_permutation_of_rows_permutes_the_gram_to_the_bit(
    kernels: Kernels, generator: torch.Generator, count: int, dtype: torch.dtype
) -> None:
    rows, spans, blocks = _shard(generator, count, dtype, alike=True)
    order = torch.randperm(count, generator=generator)
    found = kernels.gram([rows[index] for index in order], spans, blocks, 4)
    assert torch.equal(found, kernels.gram(rows, spans, blocks, 4)[:, order][:, :, order])


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.bfloat16), (5, torch.float32), (12, torch.float32),
                                              (20, torch.float16), (3, torch.float64)])  # fmt: skip
def test_what_is_not_finite_stays_in_its_row_and_column(
    kernels: Kernels, generator: torch.Generator, count: int, dtype: torch.dtype
) -> None:
    rows, spans, blocks = _shard(generator, count, dtype, alike=True)
    bad = int(torch.randint(count, (), generator=generator))
    clean = kernels.gram(rows, spans, blocks, 4)
    start, length = spans[int(spans[:, 1].argmax())].tolist()
    rows[bad][start + length // 2] = float("nan")
    found = kernels.gram(rows, spans, blocks, 4)
    block = int(blocks[int(spans[:, 1].argmax())])
    assert found[block, bad].isnan().all()
    found[block, bad] = found[block, :, bad] = clean[block, bad] = clean[block, :, bad] = 0.0
    assert torch.equal(found, clean)


def test_near_parallel_rows_keep_their_difference(kernels: Kernels, generator: torch.Generator) -> None:
    base = torch.randn(60_000, generator=generator)
    rows = [base, base + 1e-3 * torch.randn(60_000, generator=generator)]
    gram = kernels.gram(rows, torch.tensor([[0, 60_000]]), torch.tensor([0]), 1)[0]
    expected = float((rows[0].double() - rows[1].double()).square().sum())
    # The 1e-3 at 1e7 elements. Errors of chains have random signs: their share of the sum falls with the square
    # root of its length, so that 6e4 elements stand for 1e7 at sqrt(1e7 / 6e4) = 13 times the tolerance.
    assert float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]) == pytest.approx(expected, rel=1.3e-2)


@pytest.mark.parametrize("count", [2, 5, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alike", [True, False])
def test_accumulate_gram(
    kernels: Kernels, generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool
) -> None:
    rows, spans, blocks = _shard(generator, count, torch.float32, alike)
    given = [0, 1, 1, *range(3, count)]  # row 1 gets two, row 2 none
    incoming = [_row(generator, len(rows[0]), dtype, shift=index % 3) for index in range(len(given))]
    scales = torch.rand(len(given), generator=generator).add(0.1).tolist()
    offsets = [sum(language < row for language in given) for row in range(count + 1)]
    fresh = [1]
    expected = [row.clone() for row in rows]
    rows[1].fill_(float("nan"))
    reference.accumulate_gram(
        expected, torch.stack(incoming), given, scales, [row in fresh for row in range(count)],
        spans, blocks, 4,
    )  # fmt: skip
    kernels.device(shared=64 << 10)
    gram = kernels.accumulate_gram(rows, incoming, offsets, scales, fresh, spans, blocks, 4)
    for row, wanted in zip(rows, expected, strict=True):
        if dtype == torch.float64:
            # The reference rounds once, the kernel also rounds the gradient to float32.
            torch.testing.assert_close(row, wanted, rtol=2e-7, atol=1e-6)
        else:
            assert torch.equal(row, wanted)
    assert torch.equal(gram, kernels.gram(rows, spans, blocks, 4))


def test_gradients_of_an_earlier_launch_are_added_without_a_gram(
    kernels: Kernels, generator: torch.Generator
) -> None:
    rows, spans, blocks = _shard(generator, 3, torch.float32, alike=True)
    gradient = _row(generator, len(rows[0]), torch.bfloat16, shift=1)
    before = [row.clone() for row in rows]
    gram = kernels.accumulate_gram(rows, [gradient], [0, 0, 1, 1], [0.5], [], spans, blocks, 4, last=False)
    assert gram.isnan().all()
    assert torch.equal(rows[1], before[1] + 0.5 * gradient.float())
    assert torch.equal(rows[0], before[0])
    assert torch.equal(rows[2], before[2])


@pytest.mark.parametrize("count", [1, 3, 6, 40])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("out_dtype", list(DTYPES))
@pytest.mark.parametrize(("alike", "backward"), [(True, True), (True, False), (False, True)])
def test_combine(
    kernels: Kernels, generator: torch.Generator, count: int, dtype: torch.dtype, out_dtype: torch.dtype,
    alike: bool, backward: bool,
) -> None:  # fmt: skip
    rows, spans, blocks = _shard(generator, count, dtype, alike)
    weights = torch.rand(4, count, generator=generator, dtype=torch.float64)
    if count > 1:
        weights[:, 1] = 0.0
        rows[1].fill_(float("nan"))
    out = torch.full((len(rows[0]) + 3,), float("nan"), dtype=out_dtype)[3:]
    kernels.combine(rows, weights, spans, blocks, out, backward)
    exact = torch.empty_like(out, dtype=torch.float64)
    reference.combine(rows, weights, spans, blocks, exact)
    magnitudes = torch.empty_like(exact)
    reference.combine([row.double().abs() for row in rows], weights, spans, blocks, magnitudes)
    # The statement of the brief: K + 2 roundings of the arithmetic, and one, or two from float64, to out's dtype.
    arithmetic = ROUNDING[torch.float64 if dtype == torch.float64 and out_dtype == torch.float64 else torch.float32]
    bound = (count + 2) * arithmetic * magnitudes + 2 * ROUNDING[out_dtype] * exact.abs()
    smallest = 2.0**-24 if out_dtype == torch.float16 else 1e-40
    assert ((out.double() - exact).abs() <= bound + smallest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_a_row(kernels: Kernels, generator: torch.Generator, dtype: torch.dtype) -> None:
    rows, spans, blocks = _shard(generator, 5, dtype, alike=True)
    weights = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    apart = torch.full_like(rows[2], float("nan"))
    kernels.combine(rows, weights, spans, blocks, apart, True)
    kernels.combine(rows, weights, spans, blocks, rows[2], True)
    assert torch.equal(rows[2], apart)


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.bfloat16), (5, torch.float32), (11, torch.bfloat16),
                                              (24, torch.float16), (12, torch.float32), (3, torch.float64),
                                              (40, torch.bfloat16)])  # fmt: skip
def test_resolve_is_gram_solve_and_combine(
    kernels: Kernels, generator: torch.Generator, count: int, dtype: torch.dtype
) -> None:
    rows, spans, blocks = _shard(generator, count, dtype, alike=True)
    mask = torch.rand(4, count, generator=generator) < 0.8
    out, apart = (torch.full_like(rows[0], float("nan")) for _ in range(2))
    gram, weights, finite = kernels.resolve(rows, mask, 0.9, spans, blocks, out)
    assert _largest_error(gram, reference.gram(rows, spans, blocks, 4)) <= GRAM_BOUND[dtype]
    expected, flags = kernels.min_norm(gram, mask, 0.9)
    assert torch.equal(weights, expected)
    assert torch.equal(finite, flags)
    kernels.combine(rows, weights, spans, blocks, apart, True)
    assert torch.equal(out, apart)


def test_resolve_in_one_launch_only_while_rows_fit_the_cache(kernels: Kernels, generator: torch.Generator) -> None:
    rows, spans, blocks = _shard(generator, 2, torch.float32, alike=True)
    kernels.device(l2=2 * 4 * len(rows[0]))
    with pytest.raises(RuntimeError, match="do not fit into L2"):
        kernels.resolve(rows, torch.ones(4, 2, dtype=torch.bool), 1.0, spans, blocks, torch.empty_like(rows[0]))


def test_a_device_with_little_shared_memory(kernels: Kernels, generator: torch.Generator) -> None:
    rows, spans, blocks = _shard(generator, 50, torch.bfloat16, alike=True)
    kernels.device(shared=99 << 10)
    found = kernels.gram(rows, spans, blocks, 4)
    assert _largest_error(found, reference.gram(rows, spans, blocks, 4)) <= GRAM_BOUND[torch.bfloat16]


def test_no_elements_and_no_segments(kernels: Kernels) -> None:
    rows = [torch.empty(0), torch.empty(0)]
    spans, blocks = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert torch.equal(kernels.gram(rows, spans, blocks, 2), torch.zeros(2, 2, 2, dtype=torch.float64))
    rows, out = [torch.ones(5), torch.ones(5)], torch.ones(5)
    kernels.combine(rows, torch.ones(1, 2, dtype=torch.float64), spans, blocks, out, True)
    assert torch.equal(out, torch.zeros(5))


@pytest.mark.parametrize("kernel", range(4), ids=["block", "warp", "overwritten", "grid"])
def test_a_missing_barrier_shows(kernel: int) -> None:
    """In one of 20 orders at least; with the barrier all of them give the same."""
    draw = random.Random(f"{SEED}/{kernel}")

    def run(barrier: bool) -> tuple[int, ...]:
        out = torch.full((260,), -2, dtype=torch.int32)
        library().run_barriers(kernel, barrier, ctypes.c_uint32(draw.getrandbits(31)), ctypes.c_void_p(out.data_ptr()))
        return tuple(out.tolist())

    (expected,) = {run(barrier=True) for _ in range(20)}
    assert min(expected[:256]) >= 0, "everybody has written, and what the others wrote"
    assert any(run(barrier=False) != expected for _ in range(20))


@pytest.mark.parametrize("seed", range(3))
def test_tiles_cover_every_element_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(torch.seed() + seed)
    rows, spans, blocks = _shard(generator, 1, torch.float32, alike=True)
    elements = len(rows[0])
    table, first, inside = tile_table(spans, blocks, 4, elements, 100)
    owner = torch.full((elements,), -1)
    for (start, length), block in zip(spans.tolist(), blocks.tolist(), strict=True):
        owner[start : start + length] = block
    seen = torch.full((elements,), -2)
    for start, length, block in table.tolist():
        assert 1 <= length <= 100
        assert (seen[start : start + length] == -2).all()
        seen[start : start + length] = block
    assert torch.equal(seen, owner)
    assert int(first[-1]) == inside
    for block in range(4):
        assert (table[first[block] : first[block + 1], 2] == block).all()


def _shard(
    generator: torch.Generator, count: int, dtype: torch.dtype, alike: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of random alignment, alike or not; segments of random length, some empty, some of one element, of blocks 0
    to 2 in any order, and gaps."""
    lengths = [0, 1, 1, 5, 17, 300, 2500 if count < 20 else 700, 64, 1, 333]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    spans, position = [], 0
    for index in order:
        position += int(torch.randint(4, (), generator=generator)) * 5
        spans.append([position, lengths[index]])
        position += lengths[index]
    elements = position + int(torch.randint(40, (), generator=generator))
    shifts = torch.randint(16, (count,), generator=generator)
    rows = [_row(generator, elements, dtype, int(shifts[0 if alike else index])) for index in range(count)]
    return rows, torch.tensor(spans), torch.randint(3, (len(lengths),), generator=generator)


def _row(generator: torch.Generator, elements: int, dtype: torch.dtype, shift: int) -> Tensor:
    values = torch.randn(elements, generator=generator)
    row = torch.empty(elements + shift, dtype=dtype)[shift:]
    return row.copy_(values)


def _largest_error(found: Tensor, expected: Tensor) -> float:
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    return float(((found - expected).abs() / scale.clamp(min=1e-300)).max())
