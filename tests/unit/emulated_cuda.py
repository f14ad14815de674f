"""The CUDA kernels where no GPU is: the very sources of csrc/cuda, compiled by the host's compiler, run by the emulator
in `cuda_on_host`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from unit.compiled import compiled, together

from bucketmoo_ds.ops import build
from bucketmoo_ds.ops.backends.tiles import tile_table

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/cuda" / name for name in build.CUDA_SOURCES if name.endswith(".cu")]
EMULATOR = Path(__file__).parent / "cuda_on_host"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def library() -> ctypes.CDLL:
    """Returns what harness.cpp and barriers.cpp offer."""
    # Fortified jumps refuse to leave a fiber's stack.
    flags = ["-x", "c++", "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-w"]
    flags += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc/cuda'}"]
    folders = (EMULATOR, ROOT / "csrc")
    objects = together(
        partial(compiled, ["g++", *flags, "-c", str(source)], f"{source.name}.o", folders)
        for source in [*SOURCES, EMULATOR / "harness.cpp", EMULATOR / "barriers.cpp"]
    )
    files = [made for made, _ in objects]
    made, _ = compiled(["g++", "-shared", *map(str, files)], "cuda_on_host.so", files)
    return ctypes.CDLL(str(made))


class _Tiles(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "first", "inside", "outside", "blocks")]


class _Incoming(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p * 64),
        ("scale", ctypes.c_float * 64),
        ("first", ctypes.c_int32 * 65),
        ("fresh", ctypes.c_uint64),
        ("dtype", ctypes.c_int32),
    ]


class Kernels:
    """The launch layer, on tensors of the CPU. `tile` is small, so that few elements make many tiles; `order` draws the
    order in which threads and blocks run."""

    def __init__(self, order: int) -> None:
        self.library = library()
        self.library.set_order(ctypes.c_uint32(order))
        self.tile = 1000
        self.device()

    def device(self, multiprocessors: int = 3, shared: int = 227 << 10, l2: int = 50 << 20) -> None:
        self.library.set_device(multiprocessors, shared, ctypes.c_int64(l2))

    def gram(self, rows: Sequence[Tensor], spans: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
        result = _poisoned(num_blocks, len(rows), len(rows))
        with _TileTable(rows, spans, blocks, num_blocks, self.tile) as tiles:
            self._call("run_gram", _addresses(rows), len(rows), DTYPES[rows[0].dtype], tiles, _address(result))
        return result

    def accumulate_gram(
        self,
        rows: Sequence[Tensor],
        incoming: Sequence[Tensor],
        offsets: Sequence[int],
        scales: Sequence[float],
        fresh: Sequence[int],
        spans: Tensor,
        blocks: Tensor,
        num_blocks: int,
        last: bool = True,
    ) -> Tensor:
        result = _poisoned(num_blocks, len(rows), len(rows))
        table = _Incoming(fresh=sum(1 << row for row in fresh), dtype=DTYPES[incoming[0].dtype])
        for index, (gradient, scale) in enumerate(zip(incoming, scales, strict=True)):
            table.data[index], table.scale[index] = gradient.data_ptr(), scale
        for index, offset in enumerate(offsets):
            table.first[index] = offset
        with _TileTable(rows, spans, blocks, num_blocks, self.tile) as tiles:
            self._call(
                "run_accumulate", _addresses(rows), len(rows), ctypes.byref(table), tiles, last, _address(result)
            )
        return result

    def min_norm(self, gram: Tensor, mask: Tensor, max_weight: float = 1.0) -> tuple[Tensor, Tensor]:
        weights, finite = _poisoned(*mask.shape), torch.empty(len(mask), dtype=torch.bool)
        self._call(
            "run_min_norm", _address(gram), _address(mask), ctypes.c_int64(len(mask)), mask.shape[1],
            ctypes.c_double(max_weight), _address(weights), _address(finite),
        )  # fmt: skip
        return weights, finite

    def combine(
        self, rows: Sequence[Tensor], weights: Tensor, spans: Tensor, blocks: Tensor, out: Tensor, backward: bool
    ) -> None:
        with _TileTable(rows, spans, blocks, len(weights), self.tile) as tiles:
            self._call(
                "run_combine", _addresses(rows), len(rows), DTYPES[rows[0].dtype], _address(weights), tiles,
                _address(out), DTYPES[out.dtype], backward,
            )  # fmt: skip

    def resolve(
        self, rows: Sequence[Tensor], mask: Tensor, max_weight: float, spans: Tensor, blocks: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(rows)
        gram, weights = _poisoned(len(mask), count, count), _poisoned(len(mask), count)
        finite = torch.empty(len(mask), dtype=torch.bool)
        with _TileTable(rows, spans, blocks, len(mask), self.tile) as tiles:
            self._call(
                "run_resolve", _addresses(rows), count, DTYPES[rows[0].dtype], tiles, ctypes.c_int64(len(rows[0])),
                _address(mask), ctypes.c_double(max_weight), _address(gram), _address(weights), _address(finite),
                _address(out), DTYPES[out.dtype],
            )  # fmt: skip
        return gram, weights, finite

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*arguments).decode()
        if error:
            raise RuntimeError(error)


class _TileTable:
    """Keeps the table alive while a kernel reads it."""

    def __init__(self, rows: Sequence[Tensor], spans: Tensor, blocks: Tensor, num_blocks: int, tile: int) -> None:
        self.table, self.first, inside = tile_table(spans, blocks, num_blocks, len(rows[0]), tile)
        addresses = self.table.data_ptr(), self.first.data_ptr()
        self.tiles = _Tiles(*addresses, inside, len(self.table) - inside, num_blocks)

    def __enter__(self) -> object:
        return ctypes.byref(self.tiles)

    def __exit__(self, *_: object) -> None:
        return None


def _poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=torch.float64)


def _addresses(rows: Sequence[Tensor]) -> Callable[..., object]:
    return (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
