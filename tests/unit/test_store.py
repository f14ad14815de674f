"""The row store: sums of scaled gradients, window by window, in memory that is reused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.config import CHOICES
from bucketmoo_ds.pipeline.store import RowStore


@settings(deadline=None)
@given(
    adds=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(-4, 4)), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    storage=st.sampled_from(CHOICES["row_storage"]),
    windows=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_rows_are_sums(
    adds: list[tuple[int, int, float]], dtype: torch.dtype, storage: str, windows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = RowStore(storage)
    stored, rounding = (torch.bfloat16, 2**-9) if storage == "bfloat16" else (torch.float32, 2**-24)
    for _ in range(windows):
        expected: dict[tuple[int, int], torch.Tensor] = {}
        size: dict[tuple[int, int], float] = {}
        for bucket, language, scale in adds:
            gradient = torch.randn(11 + bucket, generator=generator).to(dtype)
            store.add(bucket, (language, 0), gradient, scale)
            key = (bucket, language)
            expected[key] = expected.get(key, 0) + scale * gradient.double()
            size[key] = size.get(key, 0.0) + abs(scale) * float(gradient.abs().max())
        for (bucket, language), row in expected.items():
            (found,) = store.rows(bucket, [(language, 0)])
            assert found.dtype == stored
            # At most 12 additions and products, each rounded by 2^-24 (2^-9 in bfloat16) of the sum of sizes at most.
            limit = 24 * rounding * size[bucket, language] + 1e-37
            torch.testing.assert_close(found.double(), row, rtol=0, atol=limit)
        assert store.nbytes == sum(stored.itemsize * (11 + bucket) for bucket, _ in expected)
        store.clear()


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("float32", torch.float32), ("host", torch.float32), ("float32", torch.bfloat16), ("bfloat16", torch.bfloat16)],
)
def test_one_gradient_of_scale_one_is_kept_to_the_bit(storage: str, dtype: torch.dtype) -> None:
    gradient = torch.randn(100).to(dtype)
    store = RowStore(storage)
    store.add(0, (0, 0), gradient, 1.0)
    assert torch.equal(store.rows(0, [(0, 0)])[0].to(dtype), gradient)


def test_bfloat16_rows_are_added_to_in_float32_and_rounded_once_each() -> None:
    first, second = torch.randn(1000), torch.randn(1000)
    store = RowStore("bfloat16")
    store.add(0, (0, 0), first, 1.0)
    store.add(0, (0, 0), second, 3.0)
    expected = (first.bfloat16().float() + 3.0 * second).bfloat16()
    # Where float32 rounds the sum another way, a tie may fall to the other side: one unit in the last of 8 bits, which
    # is up to 2^-7 of the number.
    torch.testing.assert_close(store.rows(0, [(0, 0)])[0], expected, rtol=2**-7, atol=0)
    assert (store.rows(0, [(0, 0)])[0] == expected).float().mean() > 0.99


@pytest.mark.parametrize("storage", CHOICES["row_storage"])
def test_only_float32_rows_on_the_device_are_for_kernels_to_add_to(storage: str) -> None:
    assert RowStore(storage).is_float32_on_device == (storage == "float32")


def test_host_rows_lie_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned, whatever device the gradient is on, so that it copies by itself."""
    pinned = torch.empty(7)
    monkeypatch.setattr("bucketmoo_ds.pipeline.store.pinned", lambda shape, dtype: pinned)
    gradient = torch.empty(7, device="meta")
    assert RowStore("host")._row((0, 0), gradient) is pinned
    assert RowStore()._row((0, 0), gradient).device.type == "meta"


@pytest.mark.parametrize("storage", CHOICES["row_storage"])
def test_the_store_does_not_keep_the_callers_tensor(storage: str) -> None:
    gradient = torch.randn(100)
    before = gradient.clone()
    store = RowStore(storage)
    store.add(0, (0, 0), gradient, 1.0)
    store.add(0, (0, 0), gradient, 2.0)
    assert torch.equal(gradient, before)
    gradient.fill_(float("nan"))
    assert store.rows(0, [(0, 0)])[0].isfinite().all()


@pytest.mark.parametrize("storage", CHOICES["row_storage"])
def test_a_new_window_forgets_even_nan_and_reuses_memory(storage: str) -> None:
    store = RowStore(storage)
    store.add(0, (1, 0), torch.full((5,), float("nan")), 1.0)
    address = store.rows(0, [(1, 0)])[0].data_ptr()
    store.clear()
    gradient = torch.randn(5).bfloat16().float()
    store.add(0, (1, 0), gradient, 0.5)
    (row,) = store.rows(0, [(1, 0)])
    assert row.data_ptr() == address
    assert torch.equal(row.float(), gradient * 0.5)


def test_rows_of_an_older_window_are_not_handed_out() -> None:
    store = RowStore()
    store.add(2, (1, 0), torch.randn(5), 1.0)
    with pytest.raises(KeyError, match="bucket 2 has no row of language 0"):
        store.rows(2, [(1, 0), (0, 0)])
    store.clear()
    with pytest.raises(KeyError, match="bucket 2 has no row of language 1"):
        store.rows(2, [(1, 0)])
