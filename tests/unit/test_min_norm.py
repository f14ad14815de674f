"""The min-norm solvers, the readable one, the CPU's and the GPU's (run by the emulator of CUDA threads), against
optimality itself, quadprog and TorchJD. Triton's is held to the same in `kernels/interpreted_min_norm.py`."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quadprog
import torch
from draw import SEED, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import MGDAWeighting
from unit.aggregate.grams import KINDS, combined_error, gram_of, make_rows, rows, times
from unit.compiled import compiled as compile_once
from unit.emulated_cuda import Kernels
from unit.min_norm_cases import GAP, NOISY, check, noisy, sizes

from bucketmoo_ds.ops.backends import min_norm

SOURCES = Path(__file__).parents[2] / "csrc"
CAPS = (1.0, 0.7, 0.4, 0.25, 0.1)
# Rows of these kinds have one solution; where several are as good, combined rows are compared.
UNIQUE = ("random", "common direction", "badly scaled")
SAME = 1e-6  # of a combined row: the root of what the ridge may move its square by
seeds = st.integers(0, 2**32 - 1)
caps = st.sampled_from(CAPS)

Solver = Callable[..., tuple[Tensor, Tensor]]


class Compiled:
    """The C++ alone, through ctypes, called as a backend's `min_norm` is."""

    def __init__(self, library: Path) -> None:
        self._solve = ctypes.CDLL(str(library)).bucketmoo_min_norm
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._solve.argtypes = [pointer, pointer, ctypes.c_double, pointer, pointer, integer, integer, integer, pointer]
        self._solve.restype = None

    def __call__(self, gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
        return self.counting(gram, mask, max_weight)[:2]

    def counting(self, gram: Tensor, mask: Tensor, max_weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns weights, finite, and by block the major steps and the equations solved."""
        steps = torch.full((len(mask), 2), -1)
        weights, finite = self.part(gram, mask, max_weight, (0, len(mask)), steps)
        assert bool((steps >= 0).all())
        return weights, finite, *steps.unbind(-1)

    def part(
        self, gram: Tensor, mask: Tensor, max_weight: float, blocks: tuple[int, int], steps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns what was written for the blocks from the first number to before the second, into NaN and false."""
        gram, mask = gram.contiguous(), mask.contiguous()
        weights = torch.full(mask.shape, float("nan"), dtype=torch.float64)
        finite = torch.zeros(mask.shape[:1], dtype=torch.bool)
        address = None if steps is None else steps.data_ptr()
        self._solve(
            gram.data_ptr(), mask.data_ptr(), max_weight, weights.data_ptr(), finite.data_ptr(),
            *blocks, mask.shape[1], address,
        )  # fmt: skip
        return weights, finite


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    folders = (SOURCES / "cpu", SOURCES / "common")
    return Compiled(compile_once(["g++", *flags, str(SOURCES / "cpu/min_norm.cpp")], "min_norm.so", folders)[0])


@pytest.fixture(scope="session")
def on_host() -> Solver:
    return Kernels(order=random.Random(f"{SEED}/min_norm").getrandbits(31)).min_norm


@pytest.fixture(scope="session", params=["compiled", "on_host"])
def port(request: pytest.FixtureRequest) -> Solver:
    found: Solver = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session", params=["reference", "compiled", "on_host"])
def solver(request: pytest.FixtureRequest) -> Solver:
    if request.param == "reference":
        return min_norm.min_norm
    found: Solver = request.getfixturevalue(request.param)
    return found


def everything(gram: Tensor) -> Tensor:
    return torch.ones(gram.shape[:-1], dtype=torch.bool)


def objective(gram: Tensor, weights: Tensor) -> Tensor:
    return (weights * times(gram, weights)).sum(-1)


@settings(deadline=None, max_examples=examples(12))
@given(rows=rows(least=1, most=12), max_weight=caps)
def test_the_answer_is_optimal(solver: Solver, rows: Tensor, max_weight: float) -> None:
    gram = gram_of(rows)
    weights, finite = solver(gram, everything(gram), max_weight)
    assert bool(finite.all())
    check(gram, weights, max_weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13, 16, 32, 64, 129])
def test_at_most_one_major_step_more_than_rows(compiled: Compiled, kind: str, count: int) -> None:
    seed = torch.seed() % 2**32
    gram = gram_of(make_rows(kind, max(16, 1000 // count), count, torch.Generator().manual_seed(seed)))
    for max_weight in (1.0, min(1.0, 4.0 / count), min(1.0, 1.5 / count)):
        weights, _, majors, solves = compiled.counting(gram, everything(gram), max_weight)
        check(gram, weights, max_weight)
        assert int(majors.max()) <= count + 1, seed
        # The loop would end at 24 K + 96: none comes near.
        assert int(solves.max()) <= 4 * count + 16, seed
        if count <= 2:
            assert int(solves.max()) == 0, "a closed form"


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(least=1, most=16), max_weight=caps, seed=seeds)
def test_a_port_equals_the_reference(port: Solver, rows: Tensor, max_weight: float, seed: int) -> None:
    gram = gram_of(rows)
    mask = torch.rand(rows.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.8
    ours, _ = port(gram, mask, max_weight)
    expected, _ = min_norm.min_norm(gram, mask, max_weight)
    assert bool(ours.isfinite().all())
    assert torch.equal(ours.sum(-1) > 0.5, mask.any(-1))
    assert combined_error(rows, ours, expected) <= SAME
    assert float(((objective(gram, ours) - objective(gram, expected)).abs() / sizes(gram)).max()) <= GAP


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(kinds=("random", "common direction"), least=1, most=12), max_weight=caps)
def test_no_larger_square_than_quadprog_s(solver: Solver, rows: Tensor, max_weight: float) -> None:
    gram = gram_of(rows)
    count = gram.shape[-1]
    cap = max(max_weight, (1.0 + 1e-12) / count)  # quadprog needs some room inside
    constraints = np.hstack([np.ones((count, 1)), np.eye(count), -np.eye(count)])
    bounds = np.concatenate([[1.0], np.zeros(count), np.full(count, -cap)])
    solutions = [quadprog.solve_qp(block.numpy(), np.zeros(count), constraints, bounds, 1)[0] for block in gram]
    expected = torch.tensor(np.array(solutions))
    weights, _ = solver(gram, everything(gram), max_weight)
    excess = (objective(gram, weights) - objective(gram, expected)) / sizes(gram)
    assert float(excess.max()) <= GAP
    # quadprog is exact up to rounding times the condition of the Gram.
    assert float(excess.min()) >= -1e-9


@settings(deadline=None, max_examples=examples(4))
@given(rows=rows(least=2, most=8))
def test_no_larger_square_than_torchjd_s(solver: Solver, rows: Tensor) -> None:
    gram = gram_of(rows)
    weights, _ = solver(gram, everything(gram), 1.0)
    peer = torch.stack([MGDAWeighting()(block) for block in gram])
    assert float(((objective(gram, weights) - objective(gram, peer)) / sizes(gram)).max()) <= GAP


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(kinds=UNIQUE, least=1, most=12))
def test_every_language_descends(solver: Solver, rows: Tensor) -> None:
    gram = gram_of(rows)
    weights, _ = solver(gram, everything(gram), 1.0)
    combined = (weights.unsqueeze(-1) * rows).sum(-2)
    least = (rows * combined.unsqueeze(-2)).sum(-1) - combined.square().sum(-1, keepdim=True)
    # A multiplier may be violated by 1e-13 of the rows' sizes; the sums round to some 1e-15 of them. Weights add up to
    # 1, so that each is rounded by 2^-52 of that, however small it is, and moves d by as much of the longest row.
    norms = rows.norm(dim=-1)
    parts = 5e-13 * norms * (weights * norms).sum(-1, keepdim=True) + 2.0**-52 * norms * norms.amax(-1, keepdim=True)
    assert float((least / parts).min()) >= -1


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(least=1, most=12), max_weight=caps, seed=seeds)
def test_the_order_of_the_rows_does_not_matter(solver: Solver, rows: Tensor, max_weight: float, seed: int) -> None:
    gram = gram_of(rows)
    order = torch.randperm(gram.shape[-1], generator=torch.Generator().manual_seed(seed))
    straight, _ = solver(gram, everything(gram), max_weight)
    permuted, _ = solver(gram[:, order][:, :, order], everything(gram), max_weight)
    assert combined_error(rows[:, order], straight[:, order], permuted) <= SAME


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(kinds=UNIQUE, least=1, most=12), max_weight=caps, seed=seeds)
def test_the_scale_of_a_block_does_not_matter(solver: Solver, rows: Tensor, max_weight: float, seed: int) -> None:
    gram = gram_of(rows)
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-900, 900, (len(gram), 1, 1), generator=generator)
    expected, _ = solver(gram, everything(gram), max_weight)
    # Powers of two change no digit, unless the smallest entries fall below the normal numbers.
    assert torch.equal(solver(torch.ldexp(gram, powers), everything(gram), max_weight)[0], expected)
    scales = 0.5 + torch.rand(len(gram), 1, 1, generator=generator, dtype=torch.float64)
    scaled, _ = solver(gram * scales, everything(gram), max_weight)
    assert combined_error(rows, scaled, expected) <= 1e-9  # rounding times the condition of the cosines


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(least=1, most=12), max_weight=caps, seed=seeds)
def test_a_mask_equals_leaving_rows_out(solver: Solver, rows: Tensor, max_weight: float, seed: int) -> None:
    gram = gram_of(rows)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows.shape[:2], generator=generator) < 0.6
    weights, finite = solver(gram, mask, max_weight)
    pairs = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    poison = torch.tensor([float("nan"), float("inf"), 1e300])[torch.randint(3, gram.shape, generator=generator)]
    poisoned, still_finite = solver(torch.where(pairs, gram, poison.double()), mask, max_weight)
    assert torch.equal(poisoned, weights)
    assert bool((finite & still_finite).all())
    assert bool((weights[~mask] == 0.0).all())
    for block in range(len(gram)):
        left = mask[block].nonzero().squeeze(-1)
        if len(left) == 0:
            continue
        part = gram[block, left][:, left].unsqueeze(0)
        alone, _ = solver(part, everything(part), max_weight)
        check(part, weights[block : block + 1, left], max_weight)
        assert combined_error(rows[block : block + 1, left], weights[block : block + 1, left], alone) <= SAME


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(kinds=UNIQUE, least=1, most=6), max_weight=caps, seed=seeds)
def test_equal_rows_share_evenly(solver: Solver, rows: Tensor, max_weight: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    copies = torch.randint(rows.shape[1], (rows.shape[1] + 4,), generator=generator)
    # Taken from one Gram, so that the products of equal rows are equal to the bit.
    gram = gram_of(rows)[:, copies][:, :, copies]
    weights, _ = solver(gram, everything(gram), max_weight)
    for language in range(rows.shape[1]):
        equal = weights[:, copies == language]
        if equal.shape[-1] > 0:
            # Two refinements of an error of 1e-16 over the ridge of 1e-13 leave 1e-9.
            torch.testing.assert_close(equal, equal.mean(-1, keepdim=True).expand_as(equal), rtol=1e-6, atol=1e-12)


@settings(deadline=None, max_examples=examples(8))
@given(rows=rows(least=2, most=12), max_weight=caps)
def test_a_gram_summed_in_float32_is_solved_as_it_is(solver: Solver, rows: Tensor, max_weight: float) -> None:
    gram = gram_of(rows.float()).double()
    gram = 0.5 * (gram + gram.mT)
    check(gram, solver(gram, everything(gram), max_weight)[0], max_weight)


@pytest.mark.parametrize(
    ("count", "rank"), [pytest.param(*sizes, marks=pytest.mark.nightly if sizes[0] > 32 else ()) for sizes in NOISY]
)
def test_a_gram_that_rounding_left_indefinite_is_solved_as_it_is(solver: Solver, count: int, rank: int) -> None:
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    gram = noisy(100 if isinstance(solver, Compiled) else 3, count, rank, torch.Generator().manual_seed(seed))
    assert bool((torch.linalg.eigvalsh(gram)[:, 0] < 0.0).all())
    for max_weight in (1.0, 3.0 / count):
        weights, finite = solver(gram, everything(gram), max_weight)
        assert bool(finite.all())
        check(gram, weights, max_weight)


@pytest.mark.parametrize("max_weight", CAPS)
@pytest.mark.parametrize("zeros", [1, 3])
def test_zero_rows_take_what_the_cap_lets_them(solver: Solver, zeros: int, max_weight: float) -> None:
    rows = make_rows("random", 5, 7, torch.Generator().manual_seed(torch.seed() % 2**32))
    rows[:, 2 : 2 + zeros] = 0.0
    gram = gram_of(rows)
    weights, finite = solver(gram, everything(gram), max_weight)
    cap = max(max_weight, 1.0 / 7.0)
    assert bool(finite.all())
    check(gram, weights, max_weight)
    assert bool((weights[:, 2 : 2 + zeros] == min(1.0 / zeros, cap)).all())
    if zeros * cap >= 1.0:
        assert float(weights.count_nonzero(dim=-1).max()) == zeros


def test_all_rows_zero_one_row_and_none(solver: Solver) -> None:
    gram = gram_of(make_rows("random", 4, 4, torch.Generator().manual_seed(torch.seed() % 2**32)))
    gram[0] = 0.0
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = torch.tensor([False, False, True, False])
    mask[2] = False
    for max_weight in CAPS:
        weights, finite = solver(gram, mask, max_weight)
        assert bool(finite.all())
        assert torch.equal(weights[0], torch.full((4,), 0.25, dtype=torch.float64))
        assert torch.equal(weights[1:3], mask[1:3].double())
    assert solver(gram[:0], mask[:0], 1.0)[0].shape == (0, 4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_a_gram_that_is_not_finite_gives_uniform_weights(
    solver: Solver, poison: float, place: tuple[int, int]
) -> None:
    gram = gram_of(make_rows("random", 3, 5, torch.Generator().manual_seed(torch.seed() % 2**32)))
    mask = torch.tensor([True, True, False, True, True]).repeat(3, 1)
    expected, _ = solver(gram, mask, 0.6)
    gram[1, place[0], place[1]] = gram[1, place[1], place[0]] = poison
    weights, finite = solver(gram, mask, 0.6)
    assert finite.tolist() == [True, False, True]
    assert torch.equal(weights[1], 0.25 * mask[1].double())
    assert torch.equal(weights[::2], expected[::2])


@settings(deadline=None, max_examples=examples(8))
@given(seed=seeds, max_weight=caps)
def test_two_rows_have_a_closed_form(solver: Solver, seed: int, max_weight: float) -> None:
    rows = make_rows("random", 20, 2, torch.Generator().manual_seed(seed))
    weights, _ = solver(gram_of(rows), torch.ones(20, 2, dtype=torch.bool), max_weight)
    first, second = rows.unbind(1)
    share = (second * (second - first)).sum(-1) / (second - first).square().sum(-1)
    cap = max(max_weight, 0.5)
    # Sums of five products that may cancel.
    torch.testing.assert_close(weights[:, 0], share.clamp(1.0 - cap, cap), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_alone_has_the_same_bits_as_among_others(compiled: Compiled, kind: str) -> None:
    """So the number of threads, and which of them solves a block, decides nothing."""
    gram = gram_of(make_rows(kind, 12, 9, torch.Generator().manual_seed(torch.seed() % 2**32)))
    mask = everything(gram)
    for max_weight in (1.0, 0.2):
        together, _ = compiled(gram, mask, max_weight)
        for begin, end in ((0, 5), (5, 5), (5, 6), (6, 12)):
            part, finite = compiled.part(gram, mask, max_weight, (begin, end))
            assert torch.equal(part[begin:end], together[begin:end])
            assert bool(finite[begin:end].all())
            assert bool(part[:begin].isnan().all() and part[end:].isnan().all()), "written outside of its blocks"
