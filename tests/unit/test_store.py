"""The row store: sums of scaled gradients, window by window, in memory that is reused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.store import RowStore


@settings(deadline=None)
@given(
    adds=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(-4, 4)), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    windows=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_rows_are_sums(adds: list[tuple[int, int, float]], dtype: torch.dtype, windows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = RowStore()
    for _ in range(windows):
        expected: dict[tuple[int, int], torch.Tensor] = {}
        size: dict[tuple[int, int], float] = {}
        for bucket, language, scale in adds:
            gradient = torch.randn(11 + bucket, generator=generator).to(dtype)
            store.add(bucket, language, gradient, scale)
            key = (bucket, language)
            expected[key] = expected.get(key, 0) + scale * gradient.double()
            size[key] = size.get(key, 0.0) + abs(scale) * float(gradient.abs().max())
        for (bucket, language), row in expected.items():
            (found,) = store.rows(bucket, [language])
            assert found.dtype == torch.float32
            # At most 12 additions and products in float32, each off by at most 2^-24 of the sum of sizes.
            torch.testing.assert_close(found.double(), row, rtol=0, atol=24 * 2**-24 * size[bucket, language] + 1e-37)
        assert store.nbytes == sum(4 * (11 + bucket) for bucket, _ in expected)
        store.clear()


def test_one_gradient_of_scale_one_is_kept_to_the_bit() -> None:
    gradient = torch.randn(100)
    store = RowStore()
    store.add(0, 0, gradient, 1.0)
    assert torch.equal(store.rows(0, [0])[0], gradient)


def test_the_store_does_not_keep_the_callers_tensor() -> None:
    gradient = torch.randn(100)
    before = gradient.clone()
    store = RowStore()
    store.add(0, 0, gradient, 1.0)
    store.add(0, 0, gradient, 2.0)
    assert torch.equal(gradient, before)
    gradient.fill_(float("nan"))
    assert store.rows(0, [0])[0].isfinite().all()


def test_a_new_window_forgets_even_nan_and_reuses_memory() -> None:
    store = RowStore()
    store.add(0, 1, torch.full((5,), float("nan")), 1.0)
    address = store.rows(0, [1])[0].data_ptr()
    store.clear()
    gradient = torch.randn(5)
    store.add(0, 1, gradient, 0.5)
    (row,) = store.rows(0, [1])
    assert row.data_ptr() == address
    assert torch.equal(row, gradient * 0.5)


def test_rows_of_an_older_window_are_not_handed_out() -> None:
    store = RowStore()
    store.add(2, 1, torch.randn(5), 1.0)
    with pytest.raises(KeyError, match="bucket 2 has no row of language 0"):
        store.rows(2, [1, 0])
    store.clear()
    with pytest.raises(KeyError, match="bucket 2 has no row of language 1"):
        store.rows(2, [1])
