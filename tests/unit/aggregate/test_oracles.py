"""Our solvers against other people's: quadprog, cvxpy and TorchJD, and against answers known in closed form."""

from __future__ import annotations

import cvxpy
import numpy as np
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import CAGradWeighting, PCGradWeighting, UPGradWeighting
from torchjd.linalg import DualConeProjector, PSDMatrix
from unit.aggregate.grams import combined_error, gram_of, rows, times

from bucketmoo_ds.aggregate import weights

# The oracles are general solvers and take no Gram whose rows are dependent or of very different norms.
EASY = ("random", "common direction")


@settings(deadline=None, max_examples=30)
@given(rows(kinds=EASY))
def test_mgda_equals_quadprog(rows: Tensor) -> None:
    num_languages = rows.shape[1]
    constraints = np.hstack([np.ones((num_languages, 1)), np.eye(num_languages)])
    bounds = np.eye(1, num_languages + 1)[0]
    gram = gram_of(rows)
    expected = [quadprog.solve_qp(block.numpy(), np.zeros(num_languages), constraints, bounds, 1)[0] for block in gram]
    # quadprog is a dual active-set method: exact up to rounding times the condition of the Gram.
    assert combined_error(rows, weights(gram, "mgda"), torch.tensor(np.array(expected))) <= 1e-7


@settings(deadline=None, max_examples=30)
@given(rows(kinds=EASY))
def test_upgrad_equals_torchjd(rows: Tensor) -> None:
    gram = gram_of(rows)
    oracle = UPGradWeighting(projector=_UnregularisedProjector())
    expected = torch.stack([oracle(block) for block in gram])
    # quadprog is exact up to rounding times the condition of the Gram; our ridge is 1e-12.
    assert combined_error(rows, weights(gram, "upgrad"), expected) <= 1e-7


class _UnregularisedProjector(DualConeProjector):
    """TorchJD's projection without what it adds to the diagonal (its own needs qpsolvers, a wrapper of quadprog)."""

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        """Returns `argmin {v @ G @ v : v >= u}` for every row u of U."""
        scaled, linear, identity = (G / G.trace()).numpy(), np.zeros(len(G)), np.eye(len(G))
        return torch.tensor(np.stack([quadprog.solve_qp(scaled, linear, identity, u.numpy())[0] for u in U]))


@settings(deadline=None, max_examples=15)
@given(rows(kinds=EASY, blocks=2), st.sampled_from((0.1, 0.5, 0.9)))
def test_cagrad_equals_torchjd(rows: Tensor, c: float) -> None:
    gram = gram_of(rows)
    ours = weights(gram, "cagrad", c=c)
    expected = torch.stack([CAGradWeighting(c=c, norm_eps=1e-4)(block) for block in gram])
    # Clarabel stops at a gap of 1e-8; the direction is good to the square root of that.
    assert combined_error(rows, ours, expected) <= 1e-3
    # So compare what CAGrad maximises, too, where the gap itself shows: the gain of the language worst off.
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    difference = (times(gram, ours).amin(-1) - times(gram, expected).amin(-1)) / trace
    assert float(difference.min()) >= -1e-7


@settings(deadline=None, max_examples=15)
@given(rows(kinds=EASY, blocks=1), st.sampled_from((0.2, 0.5, 0.8)))
def test_cagrad_gains_what_the_cone_program_in_the_full_space_gains(rows: Tensor, c: float) -> None:
    matrix = rows[0].numpy() / np.linalg.norm(rows[0].numpy())
    mean = matrix.mean(0)
    direction, gain = cvxpy.Variable(matrix.shape[1]), cvxpy.Variable()
    ball = cvxpy.norm(direction - mean, 2) <= c * np.linalg.norm(mean)
    cvxpy.Problem(cvxpy.Maximize(gain), [matrix @ direction >= gain, ball]).solve(cvxpy.CLARABEL)
    gram = torch.tensor(matrix @ matrix.T)
    ours = weights(gram, "cagrad", c=c)
    # Clarabel's own tolerance is 1e-8; the trace is 1.
    assert abs(float((gram @ ours).min()) - float(gain.value)) <= 1e-7


@settings(deadline=None, max_examples=30)
@given(rows(most=2))
def test_pcgrad_of_two_languages_equals_torchjd(rows: Tensor) -> None:
    gram = gram_of(rows)
    # With one other language there is no order to draw. The paper and TorchJD sum the K rows, ours averages them.
    expected = torch.stack([PCGradWeighting()(block) for block in gram]) / 2
    torch.testing.assert_close(weights(gram, "pcgrad"), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=30)
@given(rows(), st.integers(0, 2**32 - 1))
def test_pcgrad_equals_the_paper_s_algorithm_on_the_rows(rows: Tensor, seed: int) -> None:
    num_languages = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(num_languages, generator=generator).tolist() for _ in range(num_languages)]
    ours = (weights(gram_of(rows), "pcgrad", seed=seed).unsqueeze(-1) * rows).sum(-2)
    for block, result in zip(rows, ours, strict=True):
        total = torch.zeros_like(block[0])
        for language, order in enumerate(orders):
            row = block[language].clone()
            for other in order:
                if other != language and float(row @ block[other]) < 0.0:
                    row -= (row @ block[other]) / (block[other] @ block[other]) * block[other]
            total += row / num_languages
        # Near-parallel rows cancel: the sign of what is left of a row, about 1e-16 of it, may fall either way.
        assert float((total - result).norm() / block.norm()) <= 1e-6


def test_blocks_that_are_each_stationary_can_still_have_a_common_direction() -> None:
    """Block stationarity is weaker than Pareto stationarity: g_1 = (1, 1), g_2 = (-1, -2), one block a coordinate."""
    rows = torch.tensor([[1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    blocks = rows.T.unsqueeze(-1)
    alone = (weights(gram_of(blocks), "mgda").unsqueeze(-1) * blocks).sum(-2)
    torch.testing.assert_close(alone, torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-15)
    gram = gram_of(rows)
    w = weights(gram, "mgda")
    # The segment from (1, 1) to (-1, -2) comes nearest to 0 at (3, -2) / 13.
    torch.testing.assert_close(w, torch.tensor([8.0, 5.0], dtype=torch.float64) / 13.0, rtol=1e-14, atol=0)
    torch.testing.assert_close(gram @ w, torch.full((2,), 1.0 / 13.0, dtype=torch.float64), rtol=1e-13, atol=0)


def test_orthogonal_rows_get_weights_like_one_over_their_squares() -> None:
    squares = 10.0 ** (6.0 * torch.rand(5, 7, dtype=torch.float64) - 3.0)
    expected = (1.0 / squares) / (1.0 / squares).sum(-1, keepdim=True)
    # A gap of 1e-14 relative to the optimum bounds the relative error of a weight that is not small by its root.
    torch.testing.assert_close(weights(torch.diag_embed(squares), "mgda"), expected, rtol=1e-6, atol=1e-9)


def test_equal_rows_share_their_weight_equally() -> None:
    row = torch.randn(1, 1, 5, dtype=torch.float64)
    for rule in ("mgda", "upgrad", "cagrad", "pcgrad"):
        w = weights(gram_of(row.expand(1, 4, 5)), rule)
        # The middle of all solutions, found to about the root of the gap.
        torch.testing.assert_close(w, w.mean(-1, keepdim=True).expand(1, 4), rtol=1e-6, atol=0)
