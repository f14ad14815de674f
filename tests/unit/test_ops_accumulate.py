"""`accumulate_gram` of every backend that runs on the CPU here: rows by fused multiply-add, and the Gram of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.ops.backends import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NUM_CELLS = 3

several = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["reference", "cpu avx512", "cpu avx2", "cpu baseline"])
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


@several
@given(
    seed=st.integers(0, 2**32),
    count=st.one_of(st.integers(1, 12), st.sampled_from([64, 65, 130])),
    amount=st.integers(0, 20),
    size=st.one_of(st.integers(0, 70), st.integers(2000, 2500)),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_gram_and_incoming(
    backend: str, seed: int, count: int, amount: int, size: int, dtype: torch.dtype
) -> None:
    """Several gradients to a row, rows without any, and fresh rows full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, count, (amount,), generator=generator).tolist()
    scales = torch.randn(amount, generator=generator, dtype=torch.float64).tolist()
    fresh = [row in targets and bool(torch.rand((), generator=generator) < 0.5) for row in range(count)]
    rows = _random(generator, count, size, torch.float32)
    for row, is_fresh in zip(rows, fresh, strict=True):
        if is_fresh:
            row.fill_(float("nan"))
    incoming = _apart(generator, amount, size, dtype)
    if dtype == torch.float64:  # numbers of float32: what rounding does to others has its own test
        incoming.copy_(incoming.float())
    spans, cells = _segments(generator, size)
    expected = _expected(rows, incoming, targets, scales, fresh)
    before = incoming.clone()
    gram = ops.accumulate_gram(rows, incoming, targets, scales, fresh, spans, cells, NUM_CELLS, backend=backend)
    for row, wanted in zip(rows, expected, strict=True):
        # To the bit. The expected value is rounded to float64 first: an element in 2^29 may go the other way.
        assert torch.equal(row, wanted)
    assert torch.equal(gram, ops.gram(rows, spans, cells, NUM_CELLS, backend=backend))
    assert torch.equal(incoming, before), "the caller's gradients are changed"


@pytest.mark.parametrize("fresh", [True, False])
def test_float64_gradients_stay_as_they_are(backend: str, fresh: bool) -> None:
    row, incoming = torch.randn(999), torch.randn(999, dtype=torch.float64)
    wanted = incoming * 0.5 + (0.0 if fresh else row.double())
    before = incoming.clone()
    segment = torch.tensor([[0, 999]]), torch.tensor([0])
    ops.accumulate_gram([row], incoming.unsqueeze(0), [0], [0.5], [fresh], *segment, 1, backend=backend)
    assert torch.equal(incoming, before)
    # The gradient may be rounded to float32 first, and the sum is: 2^-24 of each, in float64's own rounding.
    bound = 2.0**-24 * (incoming.abs() * 0.5 + wanted.abs()) * (1 + 1e-6)
    assert ((row.double() - wanted).abs() <= bound).all()


def test_a_scale_is_a_float32(backend: str) -> None:
    """0.1 is not: in float64 arithmetic the sum would differ, as rows on GPUs would from those on CPUs."""
    row, gradient = torch.zeros(1), torch.tensor([3.0 * 2**20])
    segment = torch.tensor([[0, 1]]), torch.tensor([0])
    row[0] = -gradient[0] * torch.tensor(0.1)  # cancels all but the rounding of the product
    wanted = (torch.tensor(0.1).double() * gradient.double() + row.double()).float()
    ops.accumulate_gram([row], gradient.unsqueeze(0), [0], [0.1], [False], *segment, 1, backend=backend)
    assert torch.equal(row, wanted)
    assert not torch.equal(row, torch.zeros(1)), "the product is not rounded before the sum"


@pytest.mark.usefixtures("threads")
def test_equal_bits_for_any_number_of_threads(backend: str) -> None:
    rows = [torch.randn(200_000) for _ in range(4)]
    incoming = torch.randn(3, 200_000).bfloat16()
    segments = torch.tensor([[10, 150_000], [150_011, 49_000]]), torch.tensor([1, 0])
    results = []
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        own = [row.clone() for row in rows]
        gram = ops.accumulate_gram(
            own, incoming, [2, 0, 2], [1.5, 0.3, -1.0], [False] * 4, *segments, 2, backend=backend
        )
        # The reference multiplies matrices by BLAS, whose order of sums may depend on the threads.
        results.append(own if backend == "reference" else [*own, gram])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def _expected(
    rows: list[Tensor], incoming: Tensor, targets: list[int], scales: list[float], fresh: list[bool]
) -> list[Tensor]:
    """The product of two float32 is exact in float64: there is one rounding, to float32."""
    results, void = [row.clone() for row in rows], list(fresh)
    for gradient, target, scale in zip(incoming, targets, scales, strict=True):
        if target < 0:
            continue
        product = torch.tensor(scale, dtype=torch.float32).double() * gradient.double()
        results[target] = (product if void[target] else product + results[target].double()).float()
        void[target] = False
    return results


def _random(generator: torch.Generator, count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """At offsets from 0 to 15 elements in memory of their own."""
    offsets = torch.randint(0, 16, (count,), generator=generator).tolist()
    return [torch.randn(offset + size, generator=generator).to(dtype)[offset:] for offset in offsets]


def _apart(generator: torch.Generator, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """`[count, size]`, up to 8 elements apart, from an element on that is not aligned."""
    between, offset = (int(torch.randint(0, 9, (), generator=generator)) for _ in range(2))
    memory = torch.randn(offset + count * (size + between), generator=generator).to(dtype)
    return memory[offset:].view(count, size + between)[:, :size]


def _segments(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Up to three segments, empty ones too, and what lies outside of them."""
    cuts = torch.randint(0, size + 1, (6,), generator=generator).sort().values.reshape(3, 2)
    spans = torch.stack([cuts[:, 0], cuts[:, 1] - cuts[:, 0]], dim=1)
    return spans, torch.randint(0, NUM_CELLS, (3,), generator=generator)
