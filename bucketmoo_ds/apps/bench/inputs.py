"""Rows, segments and Grams of a case, and the call of an op on them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.apps.bench.cases import DTYPES, Case
from bucketmoo_ds.apps.bench.timing import Call

PATTERN = 1 << 20  # random values that a row repeats: making all of them afresh takes longer than the measurement
SCALE = 1e-3  # of an incoming gradient: rows stay far from overflow however often they are added to


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the ops and their peers get.

    Attributes:
        case: what is measured.
        rows: K tensors `[S]`; float32 where gradients are accumulated; none for min_norm.
        incoming: gradients `[K, S]` of the case's dtype, one for each row, where they are accumulated; else `[0]`.
        spans, cells: the segments, as in `bucketmoo_ds.ops.gram`, on the CPU.
        weights: `[B, K]` float64.
        mask: `[B, K]` bool, all true.
        gram: `[B, K, K]` float64, for min_norm; else `[0]`.
        out: `[S]` in the rows' dtype.
    """

    case: Case
    rows: list[Tensor]
    incoming: Tensor
    spans: Tensor
    cells: Tensor
    weights: Tensor
    mask: Tensor
    gram: Tensor
    out: Tensor

    def call(self, backend: str) -> Call:
        """Returns the call of the case's op on a backend."""
        segments = (self.spans, self.cells)
        count, blocks = self.case.languages, self.case.num_blocks
        match self.case.op:
            case "gram":
                return lambda: ops.gram(self.rows, *segments, blocks, backend=backend)
            case "combine":
                return lambda: ops.combine(self.rows, self.weights, *segments, self.out, backend=backend)
            case "accumulate_gram":
                given = (self.incoming, range(count), [SCALE] * count, [False] * count)
                return lambda: ops.accumulate_gram(self.rows, *given, *segments, blocks, backend=backend)
            case "min_norm":
                return lambda: ops.min_norm(self.gram, self.mask, backend=backend)
            case _:
                return lambda: ops.resolve(self.rows, self.mask, *segments, self.out, backend=backend)

    def separate_call(self, backend: str) -> Call:
        """Returns `gram`, `min_norm` and `combine` one after the other: what `resolve` is there to beat."""

        def separate() -> None:
            grams = ops.gram(self.rows, self.spans, self.cells, self.case.num_blocks, backend=backend)
            weights, _ = ops.min_norm(grams, self.mask, backend=backend)
            ops.combine(self.rows, weights, self.spans, self.cells, self.out, backend=backend)

        return separate


class Store:
    """Makes the inputs of one case after the other; cases that follow each other share the memory of their rows."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._pattern = torch.randn(PATTERN, device=device, generator=self._generator)
        self._held: dict[torch.dtype, list[Tensor]] = {}

    def inputs(self, case: Case) -> Inputs:
        """Returns the inputs of a case, valid until those of the next one are made."""
        shape, wide = (case.num_blocks, case.languages), {"device": self._device, "dtype": torch.float64}
        dtype = DTYPES[case.dtype]
        rows: list[Tensor] = []
        incoming = torch.empty(0, device=self._device)
        gram = torch.empty(0, **wide)  # type: ignore[call-overload]
        if case.op == "min_norm":
            gram = self._grams(*shape)
        elif case.op == "accumulate_gram":
            rows = self._rows(torch.float32, case)
            incoming = torch.empty(case.languages, case.elements, dtype=dtype, device=self._device)
            for number, gradient in enumerate(incoming):
                gradient.copy_(self._row(case.elements, dtype, 7919 * number + 1))
        else:
            rows = self._rows(dtype, case)
        starts = torch.arange(case.segments) * case.segment
        lengths = torch.full_like(starts, case.segment or case.elements)
        weights = torch.rand(shape, generator=self._generator, **wide)  # type: ignore[call-overload]
        return Inputs(
            case=case,
            rows=rows,
            incoming=incoming,
            spans=torch.stack([starts, lengths], dim=1),
            cells=torch.arange(case.segments) % case.num_blocks,
            weights=weights / weights.sum(1, keepdim=True),
            mask=torch.ones(shape, dtype=torch.bool, device=self._device),
            gram=gram,
            out=torch.zeros(case.elements, dtype=dtype, device=self._device),
        )

    def release(self) -> None:
        """Forgets the rows."""
        self._held.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows(self, dtype: torch.dtype, case: Case) -> list[Tensor]:
        held = self._held.setdefault(dtype, [])
        # A shard that is cut into whole segments is a little shorter; rows of a much longer one would waste memory.
        if held and not case.elements <= held[0].numel() <= 2 * case.elements:
            held.clear()
        length = held[0].numel() if held else case.elements
        while len(held) < case.languages:
            held.append(self._row(length, dtype, 7919 * len(held)))  # a prime: no two rows are alike
        return [row[: case.elements] for row in held[: case.languages]]

    def _row(self, length: int, dtype: torch.dtype, shift: int) -> Tensor:
        row = torch.empty(length, dtype=dtype, device=self._device)
        whole = length - length % PATTERN
        pattern = self._pattern.roll(shift).to(dtype)
        row[:whole].view(-1, PATTERN).copy_(pattern.expand(whole // PATTERN, PATTERN))
        row[whole:] = pattern[: length - whole]
        return row

    def _grams(self, num_blocks: int, count: int) -> Tensor:
        """Grams of rows with a direction in common, as gradients of languages have: `[B, K, K]` float64."""
        shape = (num_blocks, count, 2 * count)
        wide = {"device": self._device, "dtype": torch.float64, "generator": self._generator}
        rows = torch.randn(shape, **wide) + 0.3 * torch.randn(num_blocks, 1, 2 * count, **wide)  # type: ignore[call-overload]
        gram = rows @ rows.mT
        return (gram + gram.mT) / 2
