"""The reference backend of `gram` and `combine` against plain float64, and the promises of their docstrings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.backends import reference
from bucketmoo_ds.errors import ConfigError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def shards(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Rows with segments that leave gaps; what lies in the gaps is NaN, for it must not be read."""
    count, num_blocks = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    runs = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60), st.integers(0, num_blocks - 1)), max_size=8))
    spans, blocks, position = [], [], 0
    for gap, length, block in runs:
        spans.append([position + gap, length])
        blocks.append(block)
        position += gap + length
    position += draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(count):
        scale = 10.0 ** float(torch.randint(-2, 3, (), generator=generator))
        row = (torch.randn(position, generator=generator, dtype=torch.float64) * scale).to(dtype)
        kept = torch.full_like(row, float("nan"))
        for start, length in spans:
            kept[start : start + length] = row[start : start + length]
        rows.append(kept)
    table = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return rows, table, torch.tensor(blocks, dtype=torch.int64), num_blocks


def picked(rows: list[Tensor], spans: Tensor, blocks: Tensor, block: int) -> Tensor:
    """The rows of a block as one float64 matrix."""
    runs = [span for span, of in zip(spans.tolist(), blocks.tolist(), strict=True) if of == block]
    parts = [torch.stack(rows).double()[:, start : start + length] for start, length in runs]
    return torch.cat(parts, dim=1) if parts else torch.zeros(len(rows), 0, dtype=torch.float64)


@settings(deadline=None)
@given(shard=shards())
def test_gram_equals_one_matrix_product(shard: tuple[list[Tensor], Tensor, Tensor, int]) -> None:
    rows, spans, blocks, num_blocks = shard
    found = ops.gram(rows, spans, blocks, num_blocks)
    assert found.shape == (num_blocks, len(rows), len(rows))
    assert found.dtype == torch.float64
    assert torch.equal(found, found.transpose(1, 2))
    for block in range(num_blocks):
        matrix = picked(rows, spans, blocks, block)
        norms = matrix.norm(dim=1)
        # Two float64 sums of at most 480 products in different orders: 480 * 2^-53 = 5e-14 of the norms.
        bound = 1e-13 * torch.outer(norms, norms)
        assert ((found[block] - matrix @ matrix.T).abs() <= bound).all()


@settings(deadline=None)
@given(shard=shards(), seed=st.integers(0, 2**32))
def test_combine_equals_the_weighted_sum(shard: tuple[list[Tensor], Tensor, Tensor, int], seed: int) -> None:
    rows, spans, blocks, num_blocks = shard
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_blocks, len(rows), generator=generator, dtype=torch.float64)
    weights[torch.rand(weights.shape, generator=generator) < 0.3] = 0.0
    inside = torch.zeros(rows[0].shape, dtype=torch.bool)
    for out_dtype in DTYPES:
        out = torch.full(rows[0].shape, float("nan"), dtype=out_dtype)
        assert ops.combine(rows, weights, spans, blocks, out) is out
        for (start, length), block in zip(spans.tolist(), blocks.tolist(), strict=True):
            inside[start : start + length] = True
            part = torch.stack(rows)[:, start : start + length].double()
            expected = weights[block] @ part
            size = weights[block].abs() @ part.abs()
            # One rounding to the dtype of `out` (plus its smallest step where it goes subnormal), 8 float64 products.
            step = torch.finfo(out_dtype)
            bound = expected.abs() * step.eps / 2 + step.smallest_normal * step.eps + size * 1e-15
            assert ((out[start : start + length].double() - expected).abs() <= bound * 1.001).all()
        assert (out[~inside] == 0.0).all()


@settings(deadline=None)
@given(shard=shards(), seed=st.integers(0, 2**32), which=st.integers(0, 7))
def test_out_may_be_one_of_the_rows(
    shard: tuple[list[Tensor], Tensor, Tensor, int], seed: int, which: int
) -> None:
    rows, spans, blocks, num_blocks = shard
    weights = torch.randn(num_blocks, len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elsewhere = ops.combine(rows, weights, spans, blocks, torch.full_like(rows[0], float("nan")))
    out = rows[which % len(rows)]
    others = {index: row.clone() for index, row in enumerate(rows) if row is not out}
    ops.combine(rows, weights, spans, blocks, out)
    assert torch.equal(out, elsewhere)
    for index, before in others.items():
        torch.testing.assert_close(rows[index], before, rtol=0, atol=0, equal_nan=True)


def test_long_rows_cross_the_chunks() -> None:
    length = 2 * reference.CHUNK + 77
    rows = [torch.randn(length) for _ in range(3)]
    spans, blocks = torch.tensor([[5, length - 20]]), torch.tensor([0])
    matrix = torch.stack(rows).double()[:, 5 : length - 15]
    gram = ops.gram(rows, spans, blocks, 1)[0]
    # float64 sums of 65,000 products in another order.
    torch.testing.assert_close(gram, matrix @ matrix.T, rtol=0, atol=1e-11 * float(gram.max()))
    weights = torch.randn(1, 3, dtype=torch.float64)
    out = ops.combine(rows, weights, spans, blocks, torch.full((length,), float("nan"), dtype=torch.float64))
    torch.testing.assert_close(out[5 : length - 15], weights[0] @ matrix, rtol=0, atol=1e-14)
    assert (out[:5] == 0).all()
    assert (out[length - 15 :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_parallel_rows_keep_their_difference(dtype: torch.dtype) -> None:
    """|a - b|^2 = G_aa - 2 G_ab + G_bb cancels six digits here; from a float32 Gram it is lost altogether."""
    length = 100_000
    first = torch.randn(length, dtype=torch.float64)
    second = first + 1e-3 * torch.randn(length, dtype=torch.float64)
    rows = [first.to(dtype), second.to(dtype)]
    gram = ops.gram(rows, torch.tensor([[0, length]]), torch.tensor([0]), 1)[0]
    found = gram[0, 0] - 2 * gram[0, 1] + gram[1, 1]
    exact = (rows[0].double() - rows[1].double()).square().sum()
    # The Gram is good to about 1e-13 of itself, and the difference is 1e-6 of it.
    assert abs(found - exact) <= 1e-6 * exact
    if dtype == torch.float32:
        narrow = torch.stack(rows) @ torch.stack(rows).T
        assert abs(narrow[0, 0] - 2 * narrow[0, 1] + narrow[1, 1] - exact) > 1e-3 * exact


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_in_its_row_and_column(count: int, poison: float) -> None:
    rows = [torch.randn(50) for _ in range(count)]
    spans, blocks = torch.tensor([[0, 20], [20, 25]]), torch.tensor([0, 1])
    clean = ops.gram(rows, spans, blocks, 2)
    bad = count // 2
    rows[bad][7] = poison
    found = ops.gram(rows, spans, blocks, 2)
    assert torch.equal(found[1], clean[1]), "the other block is untouched"
    assert not found[0, bad].isfinite().any()
    assert not found[0, :, bad].isfinite().any()
    good = [index for index in range(count) if index != bad]
    assert torch.equal(found[0][good][:, good], clean[0][good][:, good])


def test_zero_weight_times_nan_is_zero() -> None:
    rows = [torch.randn(30), torch.full((30,), float("nan")), torch.randn(30)]
    weights = torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]], dtype=torch.float64)
    spans, blocks = torch.tensor([[0, 12], [12, 10]]), torch.tensor([0, 1])
    out = ops.combine(rows, weights, spans, blocks, torch.full((30,), float("nan")))
    expected = (0.25 * rows[0].double() + 0.75 * rows[2].double())[:12].float()
    assert torch.equal(out[:12], expected)
    assert (out[12:] == 0).all()
    weights[1, 1] = 1e-30
    assert ops.combine(rows, weights, spans, blocks, out)[12:22].isnan().all(), "only a weight of exactly 0 leaves out"


@settings(deadline=None)
@given(shard=shards())
def test_equal_bits_from_run_to_run(shard: tuple[list[Tensor], Tensor, Tensor, int]) -> None:
    rows, spans, blocks, num_blocks = shard
    first = ops.gram(rows, spans, blocks, num_blocks)
    moved = [torch.cat([row.new_zeros(3), row])[3:] for row in rows]  # at another alignment in memory
    for again in (rows, [row.clone() for row in rows], moved):
        assert torch.equal(ops.gram(again, spans, blocks, num_blocks), first)


@settings(deadline=None)
@given(shard=shards(), data=st.data())
def test_permuted_rows_permute_the_gram(
    shard: tuple[list[Tensor], Tensor, Tensor, int], data: st.DataObject
) -> None:
    """To rounding, and not to the bit: BLAS computes elements at different places of its tiles by different kernels."""
    rows, spans, blocks, num_blocks = shard
    order = data.draw(st.permutations(range(len(rows))))
    gram = ops.gram(rows, spans, blocks, num_blocks)
    permuted = ops.gram([rows[index] for index in order], spans, blocks, num_blocks)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    # Two float64 sums of at most 480 products: 480 * 2^-53 = 5e-14 of the norms.
    bound = 1e-13 * norms.unsqueeze(2) * norms.unsqueeze(1)
    assert ((permuted - gram[:, order][:, :, order]).abs() <= bound[:, order][:, :, order]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_segments(dtype: torch.dtype) -> None:
    rows = [torch.full((9,), float("nan"), dtype=dtype) for _ in range(3)]
    spans, blocks = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    gram = ops.gram(rows, spans, blocks, 4)
    assert torch.equal(gram, torch.zeros(4, 3, 3, dtype=torch.float64))
    weights = torch.ones(4, 3, dtype=torch.float64)
    out = ops.combine(rows, weights, spans, blocks, torch.full((9,), float("nan"), dtype=dtype))
    assert (out == 0).all()


def test_empty_shard() -> None:
    rows = [torch.empty(0), torch.empty(0)]
    spans, blocks = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert ops.gram(rows, spans, blocks, 1).abs().sum() == 0
    assert ops.combine(rows, torch.ones(1, 2, dtype=torch.float64), spans, blocks, torch.empty(0)).numel() == 0


class TestBackendChoice:
    @pytest.fixture(autouse=True)
    def _no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BUCKETMOO_BACKEND", raising=False)

    def test_auto_and_explicit(self) -> None:
        assert ops.choose_backend() in ops.BACKENDS
        for name in ops.BACKENDS:
            assert ops.choose_backend(name) == name

    def test_unknown_setting(self) -> None:
        with pytest.raises(ConfigError) as caught:
            ops.choose_backend("refrence")
        assert str(caught.value).startswith('bucket_moo.backend = "refrence": unknown, expected one of "auto"')
        assert 'did you mean "reference"?' in str(caught.value)

    def test_environment_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BUCKETMOO_BACKEND", "reference")
        assert ops.choose_backend("no such backend") == "reference"
        monkeypatch.setenv("BUCKETMOO_BACKEND", "")
        assert ops.choose_backend("reference") == "reference"

    def test_unknown_environment_is_not_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BUCKETMOO_BACKEND", "triton2")
        with pytest.raises(ConfigError, match='BUCKETMOO_BACKEND = "triton2": unknown'):
            ops.choose_backend("reference")
        rows, spans, blocks = [torch.randn(4)], torch.tensor([[0, 4]]), torch.tensor([0])
        with pytest.raises(ConfigError, match="BUCKETMOO_BACKEND"):
            ops.gram(rows, spans, blocks, 1)
        with pytest.raises(ConfigError, match="BUCKETMOO_BACKEND"):
            ops.combine(rows, torch.ones(1, 1, dtype=torch.float64), spans, blocks, torch.empty(4))

    def test_the_call_honours_its_argument(self) -> None:
        rows, spans, blocks = [torch.randn(4)], torch.tensor([[0, 4]]), torch.tensor([0])
        with pytest.raises(ConfigError, match=r'bucket_moo\.backend = "cuda"'):
            ops.gram(rows, spans, blocks, 1, backend="cuda")
