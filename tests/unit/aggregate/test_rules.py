"""What single rules do by their definition: closed forms, dependent rows, zero rows, noise, and what they are told."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.aggregate.grams import KINDS, RULES, combined_error, gram_of, make_rows, rows, times

from bucketmoo_ds.aggregate import create, solve, weights
from bucketmoo_ds.aggregate._definite import RIDGE
from bucketmoo_ds.aggregate._spectrum import spectrum
from bucketmoo_ds.errors import BucketMOOError, ConfigError

# Rules that see the directions of rows, and their norms only in how they divide by them.
DIRECTIONS = ("imtl_g", "config", "nash_mtl", "fairgrad")
DEFINITE = ("random", "common direction", "badly scaled", "duplicate rows")  # or as if
# How small <g_i, d> may be where it is promised to be positive, relative to the sizes of the parts of d.
ACCURACY = 1e-5  # of Grams, 2e-6, for each of 5 rows
seeds = st.integers(0, 2**32 - 1)


def combined(rows: Tensor, w: Tensor) -> Tensor:
    return (w.unsqueeze(-1) * rows).sum(-2)


def float64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def fresh(kind: str, blocks: int, languages: int) -> Tensor:
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    return make_rows(kind, blocks, languages, torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=examples(20))
@given(st.floats(-0.99, 0.99), st.floats(1e-3, 1e3))
def test_two_languages_in_closed_form(cosine: float, norm: float) -> None:
    gram = float64(1.0, cosine * norm, cosine * norm, norm**2).view(2, 2)
    mean, harmonic = (1.0 + norm) / 2.0, 1.0 / (1.0 + 1.0 / norm)
    bisector = {"imtl_g": harmonic, "config": mean / 2.0, "nash_mtl": mean / 2.0, "fairgrad": mean / 2.0}
    # As near to 1e-16 as the ridge's square is to the least eigenvalue's, 0.01.
    for rule, length in bisector.items():
        torch.testing.assert_close(weights(gram, rule), length * float64(1.0, 1.0 / norm), rtol=1e-7, atol=0)
    expected = 0.5 * float64(1.0 + max(0.0, -cosine * norm - 1.0), 1.0 + max(0.0, -cosine / norm - 1.0))
    torch.testing.assert_close(weights(gram, "dualproj"), expected, rtol=1e-7, atol=1e-12)
    expected = float64(1.0 - cosine * norm / 2.0, 1.0 - cosine / norm / 2.0)
    torch.testing.assert_close(weights(gram, "adasum"), expected, rtol=1e-12, atol=1e-15)
    if abs(cosine) < 0.9 and 0.1 < norm < 10.0:  # the least eigenvalue counts
        values, vectors = torch.linalg.eigh(gram)
        expected = values[0].sqrt() * vectors @ ((vectors.T @ float64(0.5, 0.5)) / values.sqrt())
        torch.testing.assert_close(weights(gram, "aligned_mtl"), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "random"])
def test_equal_rows_share_equally_and_orthogonal_ones_are_averaged(rule: str) -> None:
    row = fresh("random", 1, 1)
    equal = weights(gram_of(row.expand(1, 4, row.shape[-1])), rule)
    orthogonal = weights(torch.eye(4), rule)
    # CAGrad goes farther than the mean, by c ||g_0||, and Adasum sums what is orthogonal.
    expected = (0.375, 0.375) if rule == "cagrad" else (0.25, 1.0 if rule == "adasum" else 0.25)
    # The middle of all solutions, found to about the root of the gap.
    torch.testing.assert_close(equal, torch.full((1, 4), expected[0], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(orthogonal, torch.full((4,), expected[1], dtype=torch.float64), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=examples(20))
@given(rows(), st.sampled_from(("imtl_g", "config")))
def test_projections_on_all_rows_are_equal(rows: Tensor, rule: str) -> None:
    gram, norms = gram_of(rows), rows.norm(dim=-1)
    w = weights(gram, rule)
    parts = (w.abs() * norms).sum(-1, keepdim=True).clamp(min=1e-300)
    projections = times(gram, w) / norms / parts
    assert float((projections.amax(-1) - projections.amin(-1)).max()) <= ACCURACY
    assert float(projections.min()) >= -ACCURACY
    mean = norms.mean(-1, keepdim=True)
    if rule == "imtl_g":
        assert bool((((w.sum(-1) - 1.0).abs() <= 1e-9) | (w == 0.0).all(-1)).all())
    else:
        # Weights of unit rows; the affine hull's shortest vector has none larger than this, 1 / sqrt(2e-6).
        assert float((w.abs() * norms / mean).max()) <= 1e3
        # d is the mean norm times that vector, whose product with every unit row is its square. A ridge r makes b the
        # solution of (C + r) b = p 1, so that b C b = p - r |b|^2: much where rows are nearly dependent.
        square = (combined(rows, w).norm(dim=-1, keepdim=True) / mean).square()
        products = times(gram, w) / norms / mean
        of_ridge = RIDGE * (w * norms / mean).square().sum(-1, keepdim=True)
        assert bool(((products - square).abs() <= 1e-4 + 1e-2 * square + of_ridge).all())


def test_impartial_weights_that_would_go_uphill_stand_still() -> None:
    """Unit rows at -20, 0 and 20 degrees, the middle one short: the paper's weights sum to a negative number, and its d
    is the opposite of the one direction that treats all alike."""
    angles = torch.tensor([[-20.0, 0.0, 20.0]], dtype=torch.float64) * math.pi / 180.0
    flat = torch.stack([angles.cos(), angles.sin(), torch.full_like(angles, 0.3)], -1)
    short = flat * float64(1.0, 1e-3, 1.0).view(1, 3, 1)
    gram = gram_of(short)
    paper = torch.linalg.solve(gram, gram.diagonal(dim1=1, dim2=2).sqrt())
    assert float(paper.sum()) < 0.0
    assert bool((times(gram, paper / paper.sum()) < 0.0).all())
    assert torch.equal(weights(gram, "imtl_g"), torch.zeros(1, 3, dtype=torch.float64))
    assert bool((times(gram, weights(gram, "config")) > 0.0).all())


@settings(deadline=None, max_examples=examples(20))
@given(rows(kinds=DEFINITE), st.sampled_from((0.5, 1.0, 2.0, 4.0)))
def test_gains_are_a_power_of_the_weights(rows: Tensor, alpha: float) -> None:
    gram, norms = gram_of(rows), rows.norm(dim=-1)
    w = weights(gram, "fairgrad", alpha=alpha)
    assert bool((w > 0.0).all())
    torch.testing.assert_close((w * norms).sum(-1), norms.mean(-1), rtol=1e-9, atol=0)
    gains = times(gram, w) * w ** (1.0 / alpha)
    # A sum of K products that cancels to gains of 1e-4 of them, twelve digits of which norms of 1e-3 to 1e3 take.
    torch.testing.assert_close(gains / gains.mean(-1, keepdim=True), torch.ones_like(gains), rtol=1e-5, atol=0)
    if alpha == 1.0:
        assert torch.equal(w, weights(gram, "nash_mtl"))


@settings(deadline=None, max_examples=examples(12))
@given(rows(), st.sampled_from(("dualproj", "nash_mtl", "fairgrad")), st.sampled_from((torch.float64, torch.float32)))
def test_no_language_is_harmed(rows: Tensor, rule: str, dtype: torch.dtype) -> None:
    norms = rows.norm(dim=-1)
    w = weights(gram_of(rows.to(dtype)).double(), rule)
    parts = norms * (w.abs() * norms).sum(-1, keepdim=True)
    # A Gram of float32 rows is a sum of K + 3 products, each rounded by 2^-24 of its norms.
    assert float((times(gram_of(rows), w) / parts).min()) >= (-1e-6 if dtype == torch.float32 else -1e-9)
    if rule == "dualproj":
        mean = rows.mean(-2)
        d = combined(rows, w)
        # The projection: what was added is orthogonal to it.
        assert float(((mean * d - d * d).sum(-1).abs() / parts.sum(-1)).max()) <= 1e-6


@pytest.mark.parametrize("languages", [2, 3, 8, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_the_spectrum_is_lapack_s(kind: str, languages: int) -> None:
    gram = gram_of(fresh(kind, 3, languages))
    gram /= gram.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None]
    values, vectors = spectrum(gram)
    found = values.sort(-1, descending=True).values[:, :languages]
    # Rounding of a trace of at most K, and a few more digits where rows are dependent.
    torch.testing.assert_close(found, torch.linalg.eigvalsh(gram).flip(-1), rtol=0, atol=1e-11)
    torch.testing.assert_close(vectors.mT @ torch.diag_embed(values) @ vectors, gram, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=examples(12))
@given(rows())
def test_aligned_mtl_averages_orthogonal_rows_of_the_length_of_the_weakest_direction(rows: Tensor) -> None:
    w = weights(gram_of(rows), "aligned_mtl")
    values = torch.linalg.eigvalsh(gram_of(rows))
    kept = values > 2e-6 * values[:, -1:]
    weakest = torch.where(kept, values, torch.inf).amin(-1)
    clear = ((values / values[:, -1:] / 2e-6 - 1.0).abs() > 0.1).all(-1)
    count = rows.shape[1]
    squares = combined(rows, w).square().sum(-1) / weakest * count
    # The mean of K orthogonal rows of norm 1 has the squared norm 1/K, of which the part in the span is left.
    assert bool((squares[clear] <= 1.0 + 1e-6).all())
    full = kept.all(-1) & clear
    torch.testing.assert_close(squares[full], torch.ones_like(squares[full]), rtol=1e-6, atol=0)
    assert float(w.abs().max()) <= 1.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("which", [[0], [1, 2], [0, 1, 2, 3]])
def test_zero_rows_are_neither_infinite_nor_followed(rule: str, which: list[int]) -> None:
    rows = fresh("random", 3, 4)
    rows[:, which] = 0.0
    w = weights(gram_of(rows), rule)
    assert bool(w.isfinite().all())
    assert float(w.abs().max()) <= 1e3
    if rule in DIRECTIONS:
        assert bool((w[:, which] == 0.0).all())
        left = [index for index in range(4) if index not in which]
        if len(left) > 1:
            alone = weights(gram_of(rows[:, left]), rule)
            share = 1.0 if rule == "imtl_g" else len(left) / 4  # the mean of the norms counts zero rows
            torch.testing.assert_close(w[:, left], share * alone, rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=examples(20))
@given(st.sampled_from(KINDS), st.integers(2, 8), st.sampled_from((torch.float32, torch.bfloat16)), seeds)
def test_no_weight_is_enormous_whatever_a_gram_was_rounded_to(
    kind: str, languages: int, dtype: torch.dtype, seed: int
) -> None:
    rows = make_rows(kind, 4, languages, torch.Generator().manual_seed(seed))
    norms = rows.norm(dim=-1)
    for rule in (*DIRECTIONS, "aligned_mtl", "adasum", "dualproj"):
        w = weights(gram_of(rows).to(dtype), rule)
        assert bool(w.isfinite().all()), rule
        parts = (w.abs() * norms).sum(-1) / norms.amax(-1)
        assert float(parts.max()) <= 1e4, rule


@settings(deadline=None, max_examples=examples(12))
@given(rows(most=7), seeds)
def test_adasum_is_its_recursion_on_the_rows(rows: Tensor, seed: int) -> None:
    mask = torch.rand(rows.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, 0] = True
    found = combined(rows, weights(gram_of(rows), "adasum", mask))
    for block, on, result in zip(rows, mask, found, strict=True):
        expected = _adasum(list(block[on]))
        # Near-parallel rows cancel in products that the Gram has rounded.
        assert float((result - expected).norm() / block.norm()) <= 1e-7


def _adasum(level: list[Tensor]) -> Tensor:
    while len(level) > 1:
        pairs = [level[index : index + 2] for index in range(0, len(level), 2)]
        level = [
            pair[0] if len(pair) == 1
            else (1 - pair[0] @ pair[1] / (2 * pair[0] @ pair[0])) * pair[0]
            + (1 - pair[0] @ pair[1] / (2 * pair[1] @ pair[1])) * pair[1]
            for pair in pairs
        ]  # fmt: skip
    return level[0]


def test_random_weights_depend_on_seed_and_block_and_spread_alone() -> None:
    gram = gram_of(fresh("random", 6, 5))

    def drawn(blocks: Sequence[int], seed: int = 3, spread: float = 1.0) -> Tensor:
        rule = create("random", spread=spread).at("abcde", range(5), blocks)
        mask = torch.ones(len(blocks), 5, dtype=torch.bool)
        return solve(gram[: len(blocks)], mask, rule, generator=torch.Generator().manual_seed(seed))

    both = drawn(range(6))
    assert torch.equal(both, weights(gram, "random", seed=3))
    torch.testing.assert_close(both.sum(-1), torch.ones(6, dtype=torch.float64), rtol=1e-14, atol=0)
    assert len(both.unique()) == 30
    for block in range(6):  # as one rank of several, and as a stream, would ask
        assert torch.equal(drawn([block]), both[block : block + 1])
    assert torch.equal(drawn([1, 3, 5]), both[1::2])
    assert not torch.equal(drawn(range(6), seed=4), both)
    torch.testing.assert_close(drawn(range(6), spread=0.0), weights(gram, "mean"), rtol=1e-14, atol=0)
    many = torch.eye(4, dtype=torch.float64).expand(4000, 4, 4)
    logs = weights(many, "random", seed=torch.seed() % 2**32, spread=0.5).log()
    # Differences of two normal numbers: 12,000 of them know their spread to about a hundredth.
    assert abs(float((logs[:, 1:] - logs[:, :1]).std()) / (0.5 * math.sqrt(2.0)) - 1.0) < 0.05


def test_static_weights_are_shares_of_the_languages_present() -> None:
    gram = gram_of(fresh("random", 2, 3))
    torch.testing.assert_close(
        weights(gram, "static", shares=[2, 1, 1]), float64(0.5, 0.25, 0.25).expand(2, 3), rtol=1e-14, atol=0
    )
    mask = torch.tensor([[True, False, True]] * 2)
    torch.testing.assert_close(
        weights(gram, "static", mask, shares=[2, 1, 1]), float64(2 / 3, 0.0, 1 / 3).expand(2, 3), rtol=1e-14, atol=0
    )
    for shares in ({"ko": 1.0, "de": 2.0, "fr": 5.0}, [2.0, 5.0, 1.0]):
        present = create("static", shares=shares).at(["de", "fr", "ko"], [0, 2], [0, 1])
        found = solve(gram[:, :2, :2], mask[:, ::2], present, generator=torch.Generator())
        torch.testing.assert_close(found, float64(2 / 3, 1 / 3).expand(2, 2), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"de": 1.0}, "has no fr; name every language"),
        ({"de": 1.0, "fr": 1.0, "frr": 1.0}, 'frr.: no language of this run; did you mean "fr"'),
        ([1.0], "1 numbers for 2 languages"),
        ([1.0, 0.0], "0.0: expected positive numbers"),
        ([1.0, math.inf], "inf: expected positive numbers"),
        ({"de": 1.0, "fr": True}, "True: expected positive numbers"),
        ("de", "'de': expected a number for each language"),
        (1.0, "1.0: expected a number for each language"),
    ],
)
def test_bad_shares_are_refused(shares: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f'aggregator "static": shares = .*{message}'):
        create("static", shares=shares).at(["de", "fr"], [0, 1], [0])


def test_shares_by_name_need_names() -> None:
    with pytest.raises(ConfigError, match="expected 2 numbers, one for each row"):
        weights(torch.eye(2), "static", shares={"de": 1.0, "fr": 2.0})


def test_torchjd_by_name_is_torchjd() -> None:
    rows = fresh("random", 3, 4)
    gram, mask = gram_of(rows), torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, False]])
    for name, ours, factor in (("IMTLG", "imtl_g", 1), ("AlignedMTL", "aligned_mtl", 1), ("PCGrad", "pcgrad", 0.5)):
        if name == "PCGrad":  # of two languages, whose orders are no choice
            mask = torch.tensor([[True, False, True, False]] * 3)
        theirs = factor * weights(gram, f"torchjd:{name}", mask, seed=5)
        assert combined_error(rows, theirs, weights(gram, ours, mask)) <= 1e-6, name
    several = [weights(gram, "torchjd:PCGrad", seed=seed) for seed in (5, 5, 6, 7, 8)]
    assert torch.equal(several[0], several[1])
    assert any(not torch.equal(several[0], other) for other in several[2:])
    preferred = weights(gram, "torchjd:AlignedMTL", pref_vector=[1.0, 0.0, 0.0, 0.0])
    assert not torch.equal(preferred, weights(gram, "torchjd:AlignedMTL"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchjd:MDGA", {}, 'TorchJD has no such aggregator.*"IMTLG".*did you mean "MGDA"'),
        ("torchjd:GradVac", {}, "needs a Gram only and keeps no state"),
        ("torchjd:Mean", {}, "needs a Gram only and keeps no state"),
        ("torchjd:", {}, "TorchJD has no such aggregator"),
        ("torchjd:MGDA", {"eps": 1.0}, 'unknown option "eps", expected one of "epsilon", "max_iters"'),
        ("torchjd:FairGrad", {}, 'option "alpha" is missing'),
        ("torchjd:CAGrad", {"c": -1.0}, 'aggregator "torchjd:CAGrad": .*-1'),
        ("torch:MGDA", {}, '"torch:MGDA": unknown, expected one of .*"torchjd:NAME"'),
        ("static", {}, 'aggregator "static": option "shares" is missing'),
        ("fairgrad", {"alpha": 0.0}, "alpha = 0.0: expected a number from 0.5"),
        ("random", {"spread": -1.0}, "spread = -1.0: expected a number from 0.0"),
    ],
)
def test_wrong_names_and_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create(name, **options)


def test_without_torchjd_its_rules_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "torchjd":
            raise ImportError("No module named 'torchjd'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    message = r'aggregator = "torchjd:MGDA": TorchJD cannot be imported.*pip install torchjd'
    with pytest.raises(ConfigError, match=message):
        create("torchjd:MGDA")


def test_weights_of_torchjd_that_are_not_finite_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = create("torchjd:IMTLG")
    monkeypatch.setattr(type(rule), "_weighting", lambda self: lambda gram: gram[0] * math.nan)
    with pytest.raises(BucketMOOError, match=r"torchjd:IMTLG.*not finite"):
        solve(torch.eye(2).double()[None], torch.ones(1, 2, dtype=torch.bool), rule, generator=torch.Generator())
