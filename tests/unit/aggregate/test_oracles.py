"""Our solvers against other people's: quadprog, cvxpy and TorchJD, and against answers known in closed form."""

from __future__ import annotations

import cvxpy
import numpy as np
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIG,
    DualProjWeighting,
    FairGradWeighting,
    IMTLGWeighting,
    PCGradWeighting,
    UPGradWeighting,
)
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


@settings(deadline=None, max_examples=30)
@given(rows(kinds=EASY))
def test_dualproj_equals_torchjd(rows: Tensor) -> None:
    gram = gram_of(rows)
    oracle = DualProjWeighting(projector=_UnregularisedProjector())
    expected = torch.stack([oracle(block) for block in gram])
    # As upgrad's; the mean row may be a tenth of its parts, which takes a digit.
    assert combined_error(rows, weights(gram, "dualproj"), expected) <= 1e-6


@settings(deadline=None, max_examples=30)
@given(rows(kinds=EASY))
def test_imtl_g_equals_torchjd_where_that_goes_downhill(rows: Tensor) -> None:
    gram = gram_of(rows)
    oracle = IMTLGWeighting()
    expected = torch.stack([oracle(block) for block in gram])
    ours = weights(gram, "imtl_g")
    still = (ours == 0.0).all(-1, keepdim=True)
    # The square of our ridge over the least eigenvalue of the cosines, which is about 2e-3 in the worst of 1000 blocks.
    assert combined_error(rows, torch.where(still, expected, ours), expected) <= 1e-6
    uphill, enormous = (times(gram, expected) < 0.0).all(-1), expected.abs().sum(-1) > 900.0
    assert bool((uphill | enormous | ~still.squeeze(-1)).all())


@settings(deadline=None, max_examples=30)
@given(rows(kinds=EASY))
def test_config_equals_torchjd(rows: Tensor) -> None:
    oracle = ConFIG()
    # The paper and TorchJD sum the projections, ours averages them.
    expected = torch.stack([oracle(block) for block in rows]) / rows.shape[1]
    ours = (weights(gram_of(rows), "config").unsqueeze(-1) * rows).sum(-2)
    error = (ours - expected).norm(dim=-1) / rows.norm(dim=-1).mean(-1)
    # As IMTL-G's, relative to the parts of d; relative to d's scale that of the smallest hull counts once more.
    assert float(error.max()) <= 1e-5


@settings(deadline=None, max_examples=30)
@given(rows(kinds=(*EASY, "rank deficient", "duplicate rows")))
def test_aligned_mtl_equals_torchjd(rows: Tensor) -> None:
    gram = gram_of(rows)
    oracle = AlignedMTLWeighting()
    # Both are exact up to rounding times the condition of the Gram.
    assert combined_error(rows, weights(gram, "aligned_mtl"), torch.stack([oracle(block) for block in gram])) <= 1e-9


@settings(deadline=None, max_examples=10)
@given(rows(kinds=EASY), st.sampled_from((1.0, 2.0)))
def test_fairgrad_equals_torchjd_up_to_its_length(rows: Tensor, alpha: float) -> None:
    gram, norms = gram_of(rows), rows.norm(dim=-1)
    oracle = FairGradWeighting(alpha)
    expected = torch.stack([oracle(block) for block in gram])
    expected *= norms.mean(-1, keepdim=True) / (expected * norms).sum(-1, keepdim=True)
    # SciPy stops where a step changes the residual by 1e-8 of it.
    assert combined_error(rows, weights(gram, "fairgrad", alpha=alpha), expected) <= 1e-6


@settings(deadline=None, max_examples=10)
@given(rows(kinds=EASY, blocks=1))
def test_nash_mtl_s_direction_has_the_largest_product_of_gains(rows: Tensor) -> None:
    matrix = rows[0].numpy() / np.linalg.norm(rows[0].numpy(), axis=1, keepdims=True)
    direction = cvxpy.Variable(matrix.shape[1])
    gains = cvxpy.sum(cvxpy.log(matrix @ direction))
    cvxpy.Problem(cvxpy.Maximize(gains), [cvxpy.norm(direction, 2) <= 1]).solve(cvxpy.CLARABEL)
    ours = (weights(gram_of(rows), "nash_mtl").unsqueeze(-1) * rows).sum(-2)[0].numpy()
    # Clarabel's own tolerance is 1e-8, and the objective is flat there: what it maximises is compared.
    assert float(np.log(matrix @ ours / np.linalg.norm(ours)).sum()) >= float(gains.value) - 1e-6


class _UnregularisedProjector(DualConeProjector):
    """TorchJD's projection without what it adds to the diagonal (its own needs qpsolvers, a wrapper of quadprog)."""

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        """Returns `argmin {v @ G @ v : v >= u}` for every row u of U, or for U."""
        scaled, linear, identity = (G / G.trace()).numpy(), np.zeros(len(G)), np.eye(len(G))
        rows = U.reshape(-1, len(G)).numpy()
        return torch.tensor(np.stack([quadprog.solve_qp(scaled, linear, identity, u)[0] for u in rows])).view_as(U)


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


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9), st.floats(0.2, 5.0))
def test_cagrad_clipped_is_raco_s_by_a_search_over_two_weights(seed: int, c: float, other: float) -> None:
    """The function that the weights of g_w minimise, written out on the scaled rows and tried everywhere."""
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    preference = torch.tensor([1.0, other], dtype=torch.float64)
    scale = preference / preference.mean()
    scaled, mean = rows * scale.unsqueeze(1), (rows * scale.unsqueeze(1)).mean(0)
    first = torch.linspace(0.0, 1.0, 100_001, dtype=torch.float64)
    p = torch.stack([first, 1.0 - first], 1)
    each = p @ scaled
    best = p[int((each @ mean + c * mean.norm() * each.norm(dim=1)).argmin())]
    clipped = torch.minimum(best, torch.full_like(best, 0.5))
    added = clipped @ scaled
    expected = mean + c * mean.norm() * added / added.norm()
    for clip in (False, True):
        w = weights(rows @ rows.T, "cagrad", c=c, norm_eps=0.0, clip_to_preference=clip, preference=preference)
        wanted = expected if clip else mean + c * mean.norm() * (best @ scaled) / (best @ scaled).norm()
        # The search is right to 1e-5 of a row; dividing by the length of what is left makes as much more of it.
        short = float(min(added.norm(), (best @ scaled).norm()) / scaled.norm())
        if short > 1e-2:
            assert float((w @ rows - wanted).norm() / scaled.norm()) <= 1e-4 / short
