"""Conflict statistics from a Gram against the same numbers from the gradient vectors themselves."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.apps.monitor.statistics import ConflictStatistics, conflict_statistics

# Everything is float64 with at most 40 terms a sum; the square root of a Gram that cancels loses half the digits,
# and 1e-7 is ten times the square root of the machine precision.
TIGHT, SQUARE_ROOT = 1e-11, 1e-7


@st.composite
def windows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `[B, K, S]`, mask `[B, K]` and weights `[B, K]`; some rows are zero, scales differ by up to 1e6."""
    B, K, S = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.randn(B, K, S, generator=generator, dtype=torch.float64)
    rows *= 10 ** (6 * torch.rand(B, K, 1, generator=generator, dtype=torch.float64) - 3)
    rows[torch.rand(B, K, generator=generator) < 0.1] = 0
    mask = torch.rand(B, K, generator=generator) < draw(st.sampled_from((0.5, 1.1)))
    weights = torch.randn(B, K, generator=generator, dtype=torch.float64)
    return rows, mask, weights


def poisoned(rows: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> ConflictStatistics:
    """The statistics, where all that belongs to an absent language is garbage."""
    gram = rows @ rows.mT
    gram[~(mask.unsqueeze(1) & mask.unsqueeze(2))] = math.inf
    return conflict_statistics(gram, mask, torch.where(mask, weights, math.nan))


def test_the_sign_of_a_rounding_is_no_conflict() -> None:
    """Languages that share no token are orthogonal on the embedding, whatever is left of the sum."""
    gram = torch.tensor([[[1.0, -1e-17], [-1e-17, 4.0]], [[1.0, -1e-5], [-1e-5, 1.0]]], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert conflict_statistics(gram, mask, mask.double()).conflict.tolist() == [0.0, 1.0]


@settings(deadline=None)
@given(windows())
def test_every_number_is_that_of_the_vectors(window: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    rows, mask, weights = window
    found = poisoned(rows, mask, weights)
    for b in range(rows.shape[0]):
        present = [k for k in range(rows.shape[1]) if mask[b, k]]
        scale = rows[b][mask[b]].norm(dim=1).max().item() if present else 0.0
        total = weights[b][mask[b]].abs().sum().item()
        combined = sum((weights[b, k] * rows[b, k] for k in present), torch.zeros_like(rows[b, 0]))
        assert found.combined_norm[b].item() == pytest.approx(combined.norm().item(), abs=SQUARE_ROOT * scale * total)
        negative = pairs = 0
        for i in range(rows.shape[1]):
            length = rows[b, i].norm().item()
            expected = length if i in present else math.nan
            assert found.row_norm[b, i].item() == pytest.approx(expected, nan_ok=True)
            for j in range(rows.shape[1]):
                both = i in present and j in present and length > 0 and rows[b, j].norm() > 0
                assert bool(found.cosine[b, i, j].isfinite()) == bool(both)
                if both:
                    expected = torch.dot(rows[b, i], rows[b, j]).item() / (length * rows[b, j].norm().item())
                    assert found.cosine[b, i, j].item() == pytest.approx(expected, abs=TIGHT)
                    pairs += i < j
                    negative += i < j and expected < -2e-6
        assert found.conflict[b].isnan() if not pairs else found.conflict[b].item() == pytest.approx(negative / pairs)
        if not present:
            assert found.descent[b].isnan() and found.mean_norm[b].isnan() and found.near_zero[b] == 0
            continue
        mean = rows[b][mask[b]].mean(dim=0)
        assert found.mean_norm[b].item() == pytest.approx(mean.norm().item(), abs=SQUARE_ROOT * scale)
        least = min(torch.dot(rows[b, k], combined).item() for k in present)
        assert found.descent[b].item() == pytest.approx(least, abs=TIGHT * scale**2 * total)
        short = sum(rows[b, k].norm().item() <= 1e-3 * scale for k in present)
        assert found.near_zero[b].item() == short


@settings(deadline=None)
@given(windows())
def test_the_order_of_languages_does_not_matter(window: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    rows, mask, weights = window
    found, turned = poisoned(rows, mask, weights), poisoned(rows.flip(1), mask.flip(1), weights.flip(1))
    torch.testing.assert_close(turned.cosine.flip(1, 2), found.cosine, equal_nan=True, rtol=0, atol=TIGHT)
    torch.testing.assert_close(turned.conflict, found.conflict, equal_nan=True)
    assert torch.equal(turned.near_zero, found.near_zero)


def test_descends_tells_mgda_from_a_mean_that_hurts_one_language() -> None:
    rows = torch.tensor([[[4.0, 0.0], [-1.0, 1.0]]], dtype=torch.float64)
    gram, mask = rows @ rows.mT, torch.ones(1, 2, dtype=torch.bool)
    assert not conflict_statistics(gram, mask, torch.tensor([[0.5, 0.5]])).descends.item()
    # The min-norm weight of the first row: <g_2, g_2 - g_1> / |g_1 - g_2|^2 = 6 / 26.
    found = conflict_statistics(gram, mask, torch.tensor([[6 / 26, 20 / 26]], dtype=torch.float64))
    assert found.descends.item()
    assert found.descent.item() == pytest.approx(found.combined_norm.item() ** 2)


def test_rounding_at_a_stationary_block_is_no_ascent() -> None:
    row = torch.randn(1, 1, 9, dtype=torch.float64)
    rows = torch.cat([row, -row], dim=1)
    weights = torch.tensor([[0.5, 0.5 - 1e-9]], dtype=torch.float64)
    assert conflict_statistics(rows @ rows.mT, torch.ones(1, 2, dtype=torch.bool), weights).descends.item()


def test_a_block_without_a_language_harms_none() -> None:
    """As of one that only absent languages use, with granularity `refined`."""
    mask = torch.tensor([[True, True], [False, False]])
    found = conflict_statistics(torch.ones(2, 2, 2, dtype=torch.float64), mask, torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    assert found.descends.tolist() == [True, True]
    assert found.near_zero.tolist() == [0, 0]
    assert found.mean_norm.isnan().tolist() == [False, True]
    assert found.combined_norm.tolist() == [1.0, 0.0]


def test_detail_is_named_rounded_and_holds_json_once_nan_is_null() -> None:
    rows = torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    detail = poisoned(rows, mask, torch.full((2, 3), 1 / 3, dtype=torch.float64)).detail(["de", "fr", "es"])
    assert detail["weights"]["de"] == [0.33333, 0.33333]
    assert detail["weights"]["fr"][0] == 0.33333 and math.isnan(detail["weights"]["fr"][1] or 0)
    assert detail["cosine"][0][0][0] == 1.0
    assert len(json.dumps(detail["cosine"][0])) < 9 * 12
    with pytest.raises(ValueError, match="2 names"):
        poisoned(rows, mask, torch.ones(2, 3)).detail(["de", "fr"])


@pytest.mark.parametrize(
    ("gram", "mask", "weights", "message"),
    [
        (torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2), "gram: expected float64"),
        (torch.eye(2).double(), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2), "gram: expected float64"),
        (torch.eye(2)[None].double(), torch.ones(2, dtype=torch.bool), torch.ones(1, 2), r"mask: expected \[1, 2\]"),
        (torch.eye(2)[None].double(), torch.ones(1, 2), torch.ones(1, 2), "mask: expected bool"),
        (torch.eye(2)[None].double(), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3), "weights: expected"),
    ],
)
def test_bad_shapes_are_named(gram: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conflict_statistics(gram, mask, weights)
