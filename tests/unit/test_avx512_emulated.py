"""The CPU kernels for 16 lanes where there is no AVX-512: the very code, its dozen intrinsics replaced by the
compiler's vector types, against float64. What the intrinsics do, only a machine with them can show (test_ops.py)."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit.compiled import compiled

ROOT = Path(__file__).resolve().parents[2]
EMULATED = Path(__file__).parent / "avx512_emulated"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# At most (chain + log2(lanes)) roundings of 2^-24: see csrc/cpu/kernels_impl.h; float64: of a few thousand products.
BOUND = {torch.float32: 9.6e-7, torch.bfloat16: 1.92e-6, torch.float16: 1.92e-6, torch.float64: 1e-12}
COUNTS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is for x86_64")


@pytest.fixture(scope="session")
def kernels() -> ctypes.CDLL:
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-mavx2", "-mfma", "-mf16c", "-fno-trapping-math", "-Wno-psabi"]
    command = ["g++", *flags, f"-I{ROOT / 'csrc/cpu'}", str(EMULATED / "harness.cpp")]
    made, _ = compiled(command, "kernels.so", (EMULATED, ROOT / "csrc"))
    return ctypes.CDLL(str(made))


def make_rows(count: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows with a common part, which begin anywhere."""
    common = torch.randn(length + 3, dtype=torch.float64)
    return [(common + torch.randn_like(common)).to(dtype)[row % 3 :][:length] for row in range(count)]


def addresses(rows: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))


def integer(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def gram(kernels: ctypes.CDLL, rows: list[Tensor], begin: int, count: int) -> Tensor:
    pairs = torch.zeros(len(rows) * (len(rows) + 1) // 2, dtype=torch.float64)
    pointer = ctypes.c_void_p(pairs.data_ptr())
    kernels.gram(addresses(rows), DTYPES[rows[0].dtype], len(rows), integer(begin), integer(count), pointer)
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    lower = torch.tril_indices(len(rows), len(rows))
    result[lower[0], lower[1]] = pairs
    return result + result.tril(-1).T


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("count", COUNTS)
def test_gram(kernels: ctypes.CDLL, count: int, dtype: torch.dtype) -> None:
    begin = int(torch.randint(0, 40, ()))
    length = int(torch.randint(1, 4097, ()))
    rows = make_rows(count, begin + length, dtype)
    wide = torch.stack([row[begin:].double() for row in rows])
    exact = wide @ wide.T
    norms = exact.diagonal().sqrt()
    found = gram(kernels, rows, begin, length)
    assert ((found - exact).abs() <= BOUND[dtype] * norms.outer(norms)).all()
    order = torch.randperm(count)
    permuted = gram(kernels, [rows[row] for row in order.tolist()], begin, length)
    assert torch.equal(permuted, found[order][:, order])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("out_dtype", list(DTYPES))
def test_combine(kernels: ctypes.CDLL, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for count in (1, 3, 4, 7):
        begin, length = int(torch.randint(0, 40, ())), int(torch.randint(1, 1500, ()))
        rows = make_rows(count, begin + length, dtype)
        weights = torch.rand(count, dtype=torch.float64)
        out = torch.full((begin + length + 5,), 3.0, dtype=out_dtype)
        kernels.combine(
            addresses(rows), DTYPES[dtype], ctypes.c_void_p(weights.data_ptr()), count, integer(begin),
            integer(length), ctypes.c_void_p(out.data_ptr()), DTYPES[out_dtype],
        )  # fmt: skip
        parts = torch.stack([weight * row[begin:].double() for weight, row in zip(weights, rows, strict=True)])
        exact, size = parts.sum(0), parts.abs().sum(0)
        # One rounding to out's dtype, after a float64 sum, or after a float32 sum of K + 2 roundings where both are
        # short; float16 has 2^-25 for numbers near 0.
        error = (out[begin : begin + length].double() - exact).abs()
        rounding = torch.finfo(out_dtype).eps / 2
        assert (error <= rounding * exact.abs() * 1.001 + (count + 2) * 2.0**-24 * size + 2.0**-25).all()
        assert (out[:begin] == 3.0).all()
        assert (out[begin + length :] == 3.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fresh", [True, False])
def test_accumulate(kernels: ctypes.CDLL, dtype: torch.dtype, fresh: bool) -> None:
    for length in (1, 15, 16, 17, 1000):
        row, (incoming,) = torch.randn(length + 4), make_rows(1, length + 4, dtype)
        before, scale = row.clone(), 0.7
        kernels.accumulate(
            ctypes.c_void_p(row.data_ptr()), ctypes.c_void_p(incoming.data_ptr()), DTYPES[dtype],
            ctypes.c_float(scale), fresh, integer(2), integer(length),
        )  # fmt: skip
        product = float(torch.tensor(scale)) * incoming.double()
        exact = product if fresh else product + before.double()
        # The compiler does not fuse products and sums of vectors that it has to split: here the product is rounded too.
        bound = 2.0**-24 * (product.abs() + exact.abs()) * 1.001
        assert ((row.double() - exact).abs() <= bound)[2:-2].all()
        assert torch.equal(row[:2], before[:2])
        assert torch.equal(row[-2:], before[-2:])
