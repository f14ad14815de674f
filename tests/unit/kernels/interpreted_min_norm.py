"""`min_norm` by Triton's interpreter, against the readable solver; `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from draw import some
from unit.aggregate.grams import KINDS, combined_error, gram_of, make_rows
from unit.min_norm_cases import NOISY, check, noisy

from bucketmoo_ds.ops.backends import min_norm
from bucketmoo_ds.ops.backends import triton as backend

# Of a combined row. Both solvers have the same ridge, so that rounding is left, which a ridge of 1e-13 lets grow along
# dependent rows to the root of 1e-16; some 1e-12 is seen.
SAME = 1e-8


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("kind", "count", "cap"),
    some(
        [
            (kind, *sizes)
            for kind in KINDS
            for sizes in ((2, 0.6), (3, 1.0), (8, 1.0), (8, 0.3), (17, 1.0), (24, 0.1))
        ],
        3,
    ),
)
def test_the_answer_is_optimal_and_that_of_the_reference(
    generator: torch.Generator, kind: str, count: int, cap: float
) -> None:
    rows = make_rows(kind, 2 if count < 17 else 1, count, generator)
    gram = gram_of(rows)
    mask = torch.ones(gram.shape[:2], dtype=torch.bool)
    weights, finite = backend.min_norm(gram, mask, cap)
    assert finite.all()
    check(gram, weights, cap)
    expected, _ = min_norm.min_norm(gram, mask, cap)
    assert combined_error(rows, weights, expected) <= SAME


# The interpreter takes minutes for the largest.
@pytest.mark.parametrize(
    ("count", "rank"), [pytest.param(*sizes, marks=pytest.mark.nightly if sizes[0] > 8 else ()) for sizes in NOISY]
)
def test_a_gram_that_rounding_left_indefinite_is_solved_as_it_is(
    generator: torch.Generator, count: int, rank: int
) -> None:
    gram = noisy(1, count, rank, generator)
    check(gram, backend.min_norm(gram, torch.ones(1, count, dtype=torch.bool), 1.0)[0], 1.0)


@pytest.mark.parametrize("cap", [1.0, 0.3])
def test_a_mask_leaves_rows_out_whatever_they_hold(generator: torch.Generator, cap: float) -> None:
    gram = gram_of(make_rows("common direction", 2, 6, generator))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, [1, 4]] = False
    kept = [0, 2, 3, 5]
    alone, _ = backend.min_norm(gram[:, kept][:, :, kept].contiguous(), mask[:, kept].contiguous(), cap)
    gram[:, 1] = gram[:, :, 1] = float("nan")
    weights, finite = backend.min_norm(gram, mask, cap)
    assert finite.all()
    assert (weights[:, [1, 4]] == 0.0).all()
    # Sums of 6 terms and of 4 may be rounded in another order.
    torch.testing.assert_close(weights[:, kept], alone, rtol=0, atol=1e-13)


def test_special_blocks(generator: torch.Generator) -> None:
    gram = gram_of(make_rows("random", 6, 6, generator))
    mask = torch.ones(6, 6, dtype=torch.bool)
    gram[0, 3, 4] = gram[0, 4, 3] = float("inf")
    mask[1] = False
    gram[2, 1] = gram[2, :, 1] = gram[2, 4] = gram[2, :, 4] = 0.0
    mask[3] = torch.arange(6) == 3
    gram[4] = 0.0
    gram[5] *= 1e-300
    weights, finite = backend.min_norm(gram, mask, 1.0)
    assert finite.tolist() == [False, True, True, True, True, True]
    assert weights[0].tolist() == [1 / 6] * 6, "not finite: uniform"
    assert weights[1].tolist() == [0.0] * 6, "nobody there"
    assert weights[2].tolist() == [0.0, 0.5, 0.0, 0.0, 0.5, 0.0], "zero rows"
    assert weights[3].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], "one row"
    assert weights[4].tolist() == [1 / 6] * 6, "nothing but zero rows"
    # Scaled Grams have the same weights, but for the rounding of the scaling.
    torch.testing.assert_close(weights[5:], backend.min_norm(gram[5:] * 1e300, mask[5:], 1.0)[0], rtol=0, atol=1e-12)
    capped, _ = backend.min_norm(gram[2:3].contiguous(), mask[2:3].contiguous(), 0.3)
    assert capped[0, [1, 4]].tolist() == [0.3, 0.3]
    check(gram[2:3], capped, 0.3)

