"""`gram`, `combine`, `min_norm` and `resolve` of every backend that runs on the CPU here, with each instruction set:
against plain float64, and the promises of their docstrings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.ops.backends import cpu, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 97, 129]
BACKENDS = ["reference", "cpu avx512", "cpu avx2", "cpu baseline"]
FAST = BACKENDS[1:]
# Of sqrt(G_ii G_jj): chains of products in float32, see the head of csrc/cpu/kernels_impl.h. Sums in float64 of at most
# 100,000 products: 1e5 * 2^-53 = 1.1e-11, and as much for the expected value.
GRAM_BOUND = {torch.float64: 2.3e-11, torch.float32: 1e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

Shard = tuple[list[Tensor], Tensor, Tensor, int]

# A backend's fixture only says which code runs: it may serve all examples of a test.
several = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, instruction_set = request.param.partition(" ")
    reason = ops.why_unavailable(name)
    if reason:
        pytest.skip(reason)
    if name == "reference":
        yield name
        return
    if instruction_set not in cpu.instruction_sets():
        pytest.skip(f"this machine has no {instruction_set}, only {', '.join(cpu.instruction_sets())}")
    with cpu.using_instruction_set(instruction_set):
        yield name


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    """Rows at any alignment, with segments that leave gaps; what lies in the gaps is NaN, for it must not be read."""
    count, num_cells = draw(st.sampled_from(COUNTS)), draw(st.integers(1, 5))
    length = st.one_of(st.integers(0, 3), st.integers(0, 200), st.integers(2000, 3000))
    cell = st.integers(0, num_cells - 1)
    runs = draw(st.lists(st.tuples(st.integers(0, 40), length, cell), max_size=8))
    spans, position = [], 0
    for gap, size, _ in runs:
        spans.append([position + gap, size])
        position += gap + size
    seed, dtype = draw(st.integers(0, 2**32)), draw(st.sampled_from(DTYPES))
    rows = random_rows(torch.Generator().manual_seed(seed), count, position + draw(st.integers(0, 9)), dtype)
    inside = inside_of(spans, len(rows[0]))
    for row in rows:
        row[~inside] = float("nan")
    table = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return rows, table, torch.tensor([cell for _, _, cell in runs], dtype=torch.int64), num_cells


def random_rows(generator: torch.Generator, count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows of norms from 1e-2 to 1e2 per element, each in a piece of memory of its own, at an offset of its own."""
    rows = []
    for _ in range(count):
        offset = int(torch.randint(0, 16, (), generator=generator))
        scale = 10.0 ** float(torch.randint(-2, 3, (), generator=generator))
        rows.append((torch.randn(offset + size, generator=generator, dtype=torch.float64) * scale).to(dtype)[offset:])
    return rows


def inside_of(spans: list[list[int]], size: int) -> Tensor:
    inside = torch.zeros(size, dtype=torch.bool)
    for start, length in spans:
        inside[start : start + length] = True
    return inside


def exact_gram(rows: list[Tensor], spans: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Plain float64: the rows of each cell as one matrix."""
    wide = torch.stack(rows).double()
    grams = []
    for cell in range(num_cells):
        runs = spans[cells == cell].tolist()
        parts = [wide[:, start : start + length] for start, length in runs] or [wide[:, :0]]
        matrix = torch.cat(parts, dim=1)
        grams.append(matrix @ matrix.T)
    return torch.stack(grams)


def assert_gram(found: Tensor, expected: Tensor, bound: float) -> None:
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert torch.equal(found, found.transpose(1, 2)), "symmetric to the bit"
    assert ((found - expected).abs() <= bound * norms[:, :, None] * norms[:, None, :]).all()


def bound_of(backend: str, dtype: torch.dtype) -> float:
    return GRAM_BOUND[torch.float64 if backend == "reference" else dtype]


class TestGram:
    @several
    @given(shard=shards())
    def test_of_any_segments(self, backend: str, shard: Shard) -> None:
        rows = shard[0]
        found = ops.gram(*shard, backend=backend)
        assert found.shape == (shard[3], len(rows), len(rows))
        assert found.dtype == torch.float64
        assert_gram(found, exact_gram(*shard), bound_of(backend, rows[0].dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", COUNTS)
    def test_of_any_number_of_rows(
        self, backend: str, generator: torch.Generator, count: int, dtype: torch.dtype
    ) -> None:
        rows = random_rows(generator, count, 5003, dtype)
        spans, cells = torch.tensor([[1, 4000], [4000 + 7, 996]]), torch.tensor([2, 0])
        found = ops.gram(rows, spans, cells, 4, backend=backend)
        assert_gram(found, exact_gram(rows, spans, cells, 4), bound_of(backend, dtype))
        assert (found[[1, 3]] == 0).all(), "cells without segments"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_thousands_of_segments(self, backend: str, generator: torch.Generator, dtype: torch.dtype) -> None:
        lengths = torch.randint(0, 5, (5000,), generator=generator)  # of one element, and of none, too
        gaps = torch.randint(0, 2, (5000,), generator=generator)
        starts = (lengths + gaps).cumsum(0) - lengths
        rows = random_rows(generator, 5, int(starts[-1] + lengths[-1]), dtype)
        cells = torch.randint(0, 300, (5000,), generator=generator)
        spans = torch.stack([starts, lengths], dim=1)
        found = ops.gram(rows, spans, cells, 300, backend=backend)
        assert_gram(found, exact_gram(rows, spans, cells, 300), bound_of(backend, dtype))

    def test_of_rows_that_cross_chunks(self, backend: str, generator: torch.Generator) -> None:
        size = 2 * reference.CHUNK + 77
        rows = random_rows(generator, 3, size, torch.float64)
        segment = torch.tensor([[5, size - 20]]), torch.tensor([0])
        assert_gram(
            ops.gram(rows, *segment, 1, backend=backend), exact_gram(rows, *segment, 1), GRAM_BOUND[torch.float64]
        )

    @several
    @given(shard=shards(), data=st.data())
    def test_of_shards_adds_up(self, backend: str, shard: Shard, data: st.DataObject) -> None:
        """A shard ends anywhere, also within a segment: the partial Grams of both sum up to that of the whole."""
        rows, spans, cells, num_cells = shard
        cut = data.draw(st.integers(0, len(rows[0])))
        ends = spans.sum(1)
        total = torch.zeros(num_cells, len(rows), len(rows), dtype=torch.float64)
        for begin, end in ((0, cut), (cut, len(rows[0]))):
            starts = spans[:, 0].clamp(begin, end)
            part = torch.stack([starts - begin, ends.clamp(begin, end) - starts], dim=1)
            total += ops.gram([row[begin:end] for row in rows], part, cells, num_cells, backend=backend)
        # |a b| of two shards sums up to at most that of the whole (Cauchy-Schwarz): the bound holds for the sum.
        assert_gram(total, exact_gram(*shard), bound_of(backend, rows[0].dtype))

    @several
    @given(shard=shards())
    def test_equal_bits_from_run_to_run(self, backend: str, shard: Shard) -> None:
        first = ops.gram(*shard, backend=backend)
        for aligned in (False, True):
            rows = [row.clone() for row in shard[0]] if aligned else shard[0]
            assert torch.equal(ops.gram(rows, *shard[1:], backend=backend), first)

    @pytest.mark.parametrize("backend", FAST, indirect=True)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [3, 20])
    @pytest.mark.usefixtures("threads")
    def test_equal_bits_for_any_number_of_threads(
        self, backend: str, generator: torch.Generator, count: int, dtype: torch.dtype
    ) -> None:
        rows = random_rows(generator, count, 300_000, dtype)
        spans, cells = torch.tensor([[0, 3], [3, 199_990], [200_000, 99_999]]), torch.tensor([1, 0, 1])
        weights = torch.rand(2, count, generator=generator, dtype=torch.float64)
        grams, outs = [], []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            grams.append(ops.gram(rows, spans, cells, 2, backend=backend))
            outs.append(ops.combine(rows, weights, spans, cells, torch.empty_like(rows[0]), backend=backend))
        assert torch.equal(grams[0], grams[1])
        assert torch.equal(grams[0], grams[2])
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])

    @pytest.mark.parametrize("backend", FAST, indirect=True)
    @several
    @given(shard=shards(), data=st.data())
    def test_permuted_rows_permute_it_to_the_bit(self, backend: str, shard: Shard, data: st.DataObject) -> None:
        rows = shard[0]
        order = data.draw(st.permutations(range(len(rows))))
        plain = ops.gram(*shard, backend=backend)
        permuted = ops.gram([rows[index] for index in order], *shard[1:], backend=backend)
        assert torch.equal(permuted, plain[:, order][:, :, order])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 17, 33])
    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_in_its_row_and_column(
        self, backend: str, generator: torch.Generator, count: int, dtype: torch.dtype, poison: float
    ) -> None:
        rows = random_rows(generator, count, 150, dtype)
        spans, cells = torch.tensor([[0, 70], [70, 75]]), torch.tensor([0, 1])
        clean = ops.gram(rows, spans, cells, 2, backend=backend)
        bad = count // 2
        rows[bad][int(torch.randint(0, 70, (), generator=generator))] = poison
        found = ops.gram(rows, spans, cells, 2, backend=backend)
        assert torch.equal(found[1], clean[1]), "the other cell is untouched"
        assert not found[0, bad].isfinite().any()
        assert not found[0, :, bad].isfinite().any()
        good = [index for index in range(count) if index != bad]
        assert torch.equal(found[0][good][:, good], clean[0][good][:, good])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [0, 9])
    def test_without_segments(self, backend: str, dtype: torch.dtype, size: int) -> None:
        rows = [torch.full((size,), float("nan"), dtype=dtype) for _ in range(3)]
        spans, cells = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        gram = ops.gram(rows, spans, cells, 4, backend=backend)
        assert torch.equal(gram, torch.zeros(4, 3, 3, dtype=torch.float64))
        weights = torch.ones(4, 3, dtype=torch.float64)
        out = ops.combine(rows, weights, spans, cells, rows[0].clone(), backend=backend)
        assert torch.equal(out, torch.zeros(size, dtype=dtype))


class TestCombine:
    @several
    @given(shard=shards(), seed=st.integers(0, 2**32), out_dtype=st.sampled_from(DTYPES))
    def test_equals_the_weighted_sum(self, backend: str, shard: Shard, seed: int, out_dtype: torch.dtype) -> None:
        rows, spans, cells, num_cells = shard
        weights = _weights(seed, num_cells, len(rows))
        out = torch.full((len(rows[0]) + 1,), float("nan"), dtype=out_dtype)[1:]
        assert ops.combine(rows, weights, spans, cells, out, backend=backend) is out
        assert (out[~inside_of(spans.tolist(), len(out))] == 0.0).all()
        # float64 sums of K products in two orders; in float32 where rows and out have 16 bits.
        narrow = backend == "cpu" and rows[0].dtype.itemsize == out_dtype.itemsize == 2
        arithmetic = (len(rows) + 2) * (2.0**-24 if narrow else 2.0**-52)
        step = torch.finfo(out_dtype)
        for (start, length), cell in zip(spans.tolist(), cells.tolist(), strict=True):
            part = torch.stack(rows)[:, start : start + length].double()
            expected, size = weights[cell] @ part, weights[cell].abs() @ part.abs()
            # And one rounding to out's dtype, by its smallest step where it goes subnormal. One by way of float32 adds
            # at most 2^-24 of the value: less than a thousandth of the 2^-9 or 2^-12 of a 16-bit rounding's half step.
            bound = expected.abs() * step.eps / 2 * 1.001 + step.smallest_normal * step.eps + size * arithmetic
            assert ((out[start : start + length].double() - expected).abs() <= bound * (1 + 1e-12)).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("count", [1, 4, 9, 64])
    def test_16_bits_to_16_bits_within_one_step_of_the_reference(
        self, backend: str, generator: torch.Generator, count: int, dtype: torch.dtype
    ) -> None:
        """Where nothing cancels, the float32 sum is right to 66 * 2^-24 of itself: less than a step of either dtype."""
        rows = [torch.rand(1001, generator=generator).add(0.5).to(dtype) for _ in range(count)]
        weights = torch.rand(1, count, generator=generator, dtype=torch.float64) + 0.01
        segment = torch.tensor([[0, 1001]]), torch.tensor([0])
        wanted = ops.combine(rows, weights, *segment, torch.empty_like(rows[0]), backend="reference")
        found = ops.combine(rows, weights, *segment, torch.empty_like(rows[0]), backend=backend)
        # The bits of positive numbers count their steps.
        assert int((found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs().max()) <= 1

    @several
    @given(shard=shards(), seed=st.integers(0, 2**32), which=st.integers(0, 63))
    def test_out_may_be_one_of_the_rows(self, backend: str, shard: Shard, seed: int, which: int) -> None:
        rows, spans, cells, num_cells = shard
        weights = _weights(seed, num_cells, len(rows))
        elsewhere = ops.combine(rows, weights, spans, cells, torch.full_like(rows[0], float("nan")), backend=backend)
        out = rows[which % len(rows)]
        others = {index: row.clone() for index, row in enumerate(rows) if row is not out}
        ops.combine(rows, weights, spans, cells, out, backend=backend)
        assert torch.equal(out, elsewhere)
        for index, before in others.items():
            torch.testing.assert_close(rows[index], before, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zero_weight_times_nan_is_zero(
        self, backend: str, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        rows = [row.div(100) for row in random_rows(generator, 3, 30, dtype)]
        rows[1].fill_(float("nan"))
        weights = torch.tensor([[0.25, 0.0, 0.75], [0.0, -0.0, 0.0]], dtype=torch.float64)
        spans, cells = torch.tensor([[0, 12], [12, 10]]), torch.tensor([0, 1])
        out = ops.combine(rows, weights, spans, cells, torch.full_like(rows[0], float("nan")), backend=backend)
        without = ops.combine([rows[0], rows[2]], weights[:, [0, 2]], spans, cells, rows[0].clone(), backend=backend)
        assert torch.equal(out, without)
        assert out[:12].isfinite().all()
        assert (out[12:] == 0).all()
        weights[1, 1] = 1e-30
        ops.combine(rows, weights, spans, cells, out, backend=backend)
        assert out[12:22].isnan().all(), "only a weight of exactly 0 leaves out"

    def test_rows_far_apart_in_memory(self, backend: str, generator: torch.Generator) -> None:
        """Pages that nobody touches lie between them: more than 32 bits of bytes."""
        space = torch.empty((1 << 32) + 4096, dtype=torch.uint8)
        rows = [space[:4000].view(torch.float32), space[-4000:].view(torch.float32)]
        for row in rows:
            row.copy_(torch.randn(1000, generator=generator))
        segment, weights = (torch.tensor([[0, 1000]]), torch.tensor([0])), torch.rand(1, 2, dtype=torch.float64)
        found = ops.combine(rows, weights, *segment, torch.empty(1000), backend=backend)
        near = ops.combine([row.clone() for row in rows], weights, *segment, torch.empty(1000), backend=backend)
        assert torch.equal(found, near)
        assert_gram(ops.gram(rows, *segment, 1, backend=backend), exact_gram(rows, *segment, 1), 1e-6)


class TestMinNorm:
    @pytest.mark.parametrize("cap", [1.0, 0.3])
    def test_reaches_the_optimum_of_the_reference(self, backend: str, generator: torch.Generator, cap: float) -> None:
        gram, mask = _grams(generator, 512, 16)
        gram[3, 0] = gram[3, :, 0] = float("nan")
        mask[3, 0], mask[4] = True, False
        gram[5, 0] = gram[5, :, 0] = float("nan")
        mask[5] = True
        mask[5, 0] = False  # what is masked influences nothing
        weights, finite = ops.min_norm(gram, mask, max_weight=cap, backend=backend)
        assert finite.sum() == 511
        assert not finite[3]
        assert torch.equal(weights[3], mask[3].double() / mask[3].sum())
        assert (weights[~mask] == 0).all()
        # Sums of 16 float64 weights.
        torch.testing.assert_close(weights.sum(1), mask.any(1).double(), rtol=0, atol=1e-14)
        assert (weights <= (1.0 / mask.sum(1, keepdim=True).clamp(min=1).double()).clamp(min=cap) * (1 + 1e-14)).all()
        expected, _ = ops.min_norm(gram, mask, max_weight=cap, backend="reference")
        # Rows of full rank have one solution. Multipliers are right to 1e-12, the cosines' condition is below 1e4.
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("count", [65, 200])
    def test_more_rows_than_a_kernel_takes(self, backend: str, generator: torch.Generator, count: int) -> None:
        gram, mask = _grams(generator, 3, count)
        weights, finite = ops.min_norm(gram, mask, backend=backend)
        products = (gram @ weights.unsqueeze(-1)).squeeze(-1)
        gap = (weights * products).sum(1) - products.where(mask, torch.inf).amin(1)
        assert finite.all()
        assert (weights[~mask] == 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-13)
        # The gap that docs/kernels.md promises, and the rounding of the test's own sums.
        assert (gap <= 2e-12 * gram.diagonal(dim1=1, dim2=2).sum(1)).all()


class TestResolve:
    @several
    @given(shard=shards(), seed=st.integers(0, 2**32), cap=st.floats(0.05, 1.0), in_place=st.booleans())
    def test_is_gram_then_min_norm_then_combine(
        self, backend: str, shard: Shard, seed: int, cap: float, in_place: bool
    ) -> None:
        rows, spans, cells, num_cells = shard
        mask = torch.rand(num_cells, len(rows), generator=torch.Generator().manual_seed(seed)) < 0.8
        gram = ops.gram(*shard, backend=backend)
        weights, finite = ops.min_norm(gram, mask, max_weight=cap, backend=backend)
        expected = ops.combine(rows, weights, spans, cells, torch.empty_like(rows[0]), backend=backend)
        out = rows[-1] if in_place else torch.full_like(rows[0], float("nan"))
        results = ops.resolve(rows, mask, spans, cells, out, max_weight=cap, backend=backend)
        for found, wanted in zip((*results, out), (gram, weights, finite, expected), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("op", ["gram", "accumulate_gram", "min_norm", "combine", "resolve"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, generator: torch.Generator, op: str, dtype: torch.dtype) -> None:
    """The schema says what is written, and the fake gives the shapes and dtypes of the op."""
    rows = random_rows(generator, 3, 50, torch.float32 if op == "accumulate_gram" else dtype)
    segment = torch.tensor([[0, 20], [22, 28]]), torch.tensor([0, 1])
    weights, mask = torch.rand(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    incoming = torch.randn(3, 50, generator=generator).to(dtype)
    arguments = {
        "gram": (rows, *segment, 2),
        "accumulate_gram": (rows, incoming, [2, -1, 0], [0.5, 1.0, 2.0], [False, False, True], *segment, 2),
        "min_norm": (ops.gram(rows, *segment, 2), mask),
        "combine": (rows, weights, *segment, torch.empty_like(rows[0])),
        "resolve": (rows, mask, *segment, torch.empty_like(rows[0])),
    }[op]
    torch.library.opcheck(
        getattr(torch.ops.bucketmoo_ds, op).default, arguments, {"backend": backend},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def _weights(seed: int, num_cells: int, count: int) -> Tensor:
    """Of both signs, some exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_cells, count, generator=generator, dtype=torch.float64)
    weights[torch.rand(weights.shape, generator=generator) < 0.3] = 0.0
    return weights


def _grams(generator: torch.Generator, num_cells: int, count: int) -> tuple[Tensor, Tensor]:
    """Grams of full rank, of norms from 1e-3 to 1e3, and masks."""
    rows = torch.randn(num_cells, count, 3 * count, generator=generator, dtype=torch.float64)
    rows *= 10 ** (6 * torch.rand(num_cells, count, 1, generator=generator, dtype=torch.float64) - 3)
    gram = rows @ rows.transpose(1, 2)
    mask = torch.rand(num_cells, count, generator=generator) < 0.9
    mask[:, -1] = True
    return (gram + gram.transpose(1, 2)) / 2, mask
