"""What must hold for every aggregator, or for one by its definition, on Grams of every hard kind."""

from __future__ import annotations

import pytest
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.aggregate.grams import KINDS, combined_error, gram_of, make_rows, rows, times

from bucketmoo_ds.aggregate import create, names, solve, weights

RULES = tuple(name for name in names() if name not in ("anchor", "static"))  # they have to be told something
ORDERED = ("pcgrad", "gradvac", "adasum", "random")  # the order of the languages counts
UNORDERED = tuple(name for name in RULES if name not in ORDERED)
# Rows whose answers agree to rounding; where near-parallel or badly scaled rows cancel, Grams keep fewer digits.
PLAIN = ("random", "common direction", "rank deficient", "duplicate rows")
# Two solves of one problem in another order or batch: both stop at a gap of 1e-14 or better of a squared norm, so
# their combined rows differ by the square root of that at the most.
SAME = 1e-6
seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=examples(12))
@given(rows())
def test_mgda_is_optimal(rows: Tensor) -> None:
    gram = gram_of(rows)
    w = weights(gram, "mgda")
    products, trace = times(gram, w), gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    gap = (w * products).sum(-1) - products.amin(-1)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(-1), torch.ones(len(w), dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((gap / trace).max()) <= 1e-10


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=("random", "common direction", "badly scaled")))
def test_mgda_lets_every_language_descend(rows: Tensor) -> None:
    gram = gram_of(rows)
    w = weights(gram, "mgda")
    combined = (w.unsqueeze(-1) * rows).sum(-2)
    square = combined.square().sum(-1, keepdim=True)
    # <g_i, d> and ||d||^2 are sums of products of rows, each with the rounding of its own terms: 1e-12 of their sizes.
    # Weights add up to 1, so that each is rounded by 2^-52 of that, however small it is, and moves d by as much of g_j.
    norms = rows.norm(dim=-1)
    rounding = 1e-12 * norms * (w * norms).sum(-1, keepdim=True) + 2.0**-52 * norms * norms.amax(-1, keepdim=True)
    least = (rows * combined.unsqueeze(-2)).sum(-1) - square * (1 - 1e-6)
    assert float((least / rounding).min()) >= -1


@settings(deadline=None, max_examples=examples(12))
@given(rows(least=3), st.sampled_from((0.1, 0.4, 0.6)), st.sampled_from(("none", "unit")))
def test_mgda_keeps_to_its_cap_and_is_optimal_within_it(rows: Tensor, max_weight: float, normalize: str) -> None:
    shown = rows / rows.norm(dim=-1, keepdim=True) if normalize == "unit" else rows
    w = weights(gram_of(rows), "mgda", normalize=normalize, max_weight=max_weight)
    if normalize == "unit":
        w = w * rows.norm(dim=-1)  # in terms of the unit rows, which are what the cap holds for
        w = w / w.sum(-1, keepdim=True)
    cap = max(max_weight, 1.0 / rows.shape[1])
    assert float(w.max()) <= cap * (1.0 + 1e-12)
    products, trace = times(gram_of(shown), w), shown.square().sum((-2, -1))
    filled = (1.0 - cap * torch.arange(rows.shape[1], dtype=torch.float64)).clamp(0.0, cap)
    gap = (w * products).sum(-1) - (products.sort(-1).values * filled).sum(-1)
    assert float((gap / trace).max()) <= 1e-10


def test_a_cap_of_an_equal_share_or_less_is_the_mean() -> None:
    gram = gram_of(make_rows("random", 4, 5, torch.Generator().manual_seed(torch.seed() % 2**32)))
    for max_weight in (0.2, 0.01):
        capped = weights(gram, "mgda", max_weight=max_weight)
        torch.testing.assert_close(capped, weights(gram, "mean"), rtol=1e-14, atol=0)


@settings(deadline=None, max_examples=examples(12))
@given(rows())
def test_upgrad_harms_no_language(rows: Tensor) -> None:
    gram, norms = gram_of(rows), rows.norm(dim=-1)
    w = weights(gram, "upgrad")
    parts = norms * (w * norms).sum(-1, keepdim=True)
    # The ridge of 1e-12, and float64's rounding of the cancelled sum.
    assert float((times(gram, w) / parts).min()) >= -1e-10


@settings(deadline=None, max_examples=examples(12))
@given(rows(), st.floats(0.05, 0.95))
def test_cagrad_stays_in_its_ball_and_is_optimal_in_it(rows: Tensor, c: float) -> None:
    gram = gram_of(rows)
    w = weights(gram, "cagrad", c=c)
    present = torch.full_like(w, 1.0 / w.shape[-1])
    mean = rows.mean(-2)
    radius = c * mean.norm(dim=-1)
    point = ((w - present).unsqueeze(-1) * rows).sum(-2)
    size = rows.norm(dim=-1).sum(-1)
    moving = (w != 0.0).any(-1)
    off = (point.norm(dim=-1) - radius).abs() / size
    # The multipliers of g_w are what is added to the mean's 1/K; stationary blocks give weight 0 to all.
    added = (w - present).clamp(min=0.0)
    share = added / added.sum(-1, keepdim=True)
    products = times(gram, w)
    gap = ((share * products).sum(-1) - products.amin(-1)) / gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Rounding of a sum that cancels down to norm_eps = 1e-4 of its parts: 1e-16 / 1e-4^2.
    assert float(torch.where(moving, off, 0.0).max()) <= 1e-7
    assert float(torch.where(moving, gap, 0.0).max()) <= 1e-7


@settings(deadline=None, max_examples=examples(12))
@given(rows(), st.sampled_from(RULES))
def test_weights_do_not_depend_on_the_scale_of_the_gram(rows: Tensor, rule: str) -> None:
    gram = gram_of(rows)
    # Powers of two change no digit, so that the answers are the same bits.
    assert torch.equal(weights(gram, rule), weights(gram * 2.0**60, rule))
    assert torch.equal(weights(gram, rule), weights(gram * 2.0**-60, rule))


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=PLAIN), st.sampled_from(UNORDERED), seeds)
def test_the_order_of_the_languages_does_not_matter(rows: Tensor, rule: str, seed: int) -> None:
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    straight, permuted = weights(gram_of(rows), rule), weights(gram_of(rows[:, order]), rule)
    assert combined_error(rows[:, order], straight[:, order], permuted) <= SAME


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=PLAIN, least=3), st.sampled_from(UNORDERED), seeds)
def test_masking_a_language_equals_deleting_it(rows: Tensor, rule: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gone = int(torch.randint(rows.shape[1], (), generator=generator))
    left = [index for index in range(rows.shape[1]) if index != gone]
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    mask[:, gone] = False
    gram = gram_of(rows)
    poisoned = gram.clone()
    poisoned[:, gone], poisoned[:, :, gone] = float("nan"), float("inf")
    masked = weights(gram, rule, mask)
    assert torch.equal(masked[:, gone], torch.zeros(len(rows), dtype=torch.float64))
    assert torch.equal(masked, weights(poisoned, rule, mask))
    assert combined_error(rows[:, left], masked[:, left], weights(gram_of(rows[:, left]), rule)) <= SAME


@settings(deadline=None, max_examples=examples(12))
@given(rows(least=3), seeds)
def test_pcgrad_with_a_masked_language_ignores_it(rows: Tensor, seed: int) -> None:
    gram = gram_of(rows)
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    mask[:, 0] = False
    poisoned = gram.clone()
    poisoned[:, 0], poisoned[:, :, 0] = float("nan"), float("nan")
    result = weights(poisoned, "pcgrad", mask, seed=seed)
    assert torch.equal(result, weights(gram, "pcgrad", mask, seed=seed))
    assert bool((result[:, 0] == 0).all())
    assert bool((result[:, 1:].sum(-1) >= 1 - 1e-12).all())  # A projection only ever adds multiples of other rows.


@pytest.mark.parametrize("rule", [*UNORDERED, "pcgrad", "adasum"])
@settings(deadline=None, max_examples=examples(3))
@given(rows(least=5, most=12), st.sampled_from(("none", "unit")), seeds)
def test_a_block_gets_the_same_bits_alone_and_among_any_others(
    rule: str, rows: Tensor, normalize: str, seed: int
) -> None:
    """However many threads share the blocks out: blocks are resolved one by one on one rank, all at once on another."""
    gram = gram_of(rows)
    degenerate = torch.stack([gram[0] * float("nan"), gram[0] * 0.0, torch.ones_like(gram[0]), -gram[0]])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        mask = torch.ones(8, rows.shape[1], dtype=torch.bool)
        mask[7, 1:] = False
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.cat([degenerate, gram])
        together = solve(blocks, mask, create(rule), normalize=normalize, generator=generator)
    finally:
        torch.set_num_threads(threads)
    for block in range(8):
        generator = torch.Generator().manual_seed(seed)
        one = slice(block, block + 1)
        alone = solve(blocks[one], mask[one], create(rule), normalize=normalize, generator=generator)
        assert torch.equal(together[one], alone), block


@settings(deadline=None, max_examples=examples(8))
@given(rows(kinds=("rank deficient", "duplicate rows", "common direction")))
def test_a_gram_summed_in_float32_is_solved_as_well_as_it_is_known(rows: Tensor) -> None:
    """Where rows are dependent it has eigenvalues of about -1e-7, and no convex problem belongs to it."""
    exact = gram_of(rows)
    rounded = gram_of(rows.float()).double()
    norms = rows.norm(dim=-1)
    w = weights(rounded, "upgrad")
    parts = norms * (w * norms).sum(-1, keepdim=True)
    # A sum of K + 3 products, each rounded by 2^-24 of its norms.
    assert float((times(exact, w) / parts).min()) >= -1e-6
    gains = [times(exact, weights(gram, "cagrad")).amin(-1) for gram in (exact, rounded)]
    # g_w counts as 0 from 1e-4 of its parts; in a Gram that is off by 1e-7 they seem about 3e-4 longer or shorter.
    assert float(((gains[0] - gains[1]) / exact.diagonal(dim1=-2, dim2=-1).sum(-1)).abs().max()) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_of_many_languages(kind: str) -> None:
    rows = make_rows(kind, 128, 16, torch.Generator().manual_seed(torch.seed() % 2**32))
    gram = gram_of(rows)
    for rule in RULES:
        w = weights(gram, rule)
        assert bool(w.isfinite().all()), rule
    products, trace = times(gram, weights(gram, "mgda")), gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = (weights(gram, "mgda") * products).sum(-1)
    assert float(((square - products.amin(-1)) / trace).max()) <= 1e-10


@settings(deadline=None, max_examples=examples(12))
@given(rows(), st.sampled_from(RULES))
def test_weights_are_finite_and_without_conflict_upgrad_and_pcgrad_average(rows: Tensor, rule: str) -> None:
    assert bool(weights(gram_of(rows), rule).isfinite().all())
    friendly = gram_of(rows.abs())
    average = weights(friendly, "mean")
    for projecting in ("upgrad", "pcgrad"):
        torch.testing.assert_close(weights(friendly, projecting), average, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_a_gram_that_is_not_finite_gives_uniform_weights_and_touches_no_other_block(rule: str) -> None:
    gram = gram_of(make_rows("random", 4, 3, torch.Generator().manual_seed(torch.seed() % 2**32)))
    healthy = weights(gram, rule)
    broken = gram.clone()
    broken[1, 0, 2], broken[3, 1, 1] = float("inf"), float("nan")
    result = weights(broken, rule)
    third = torch.full((3,), 1.0 / 3.0, dtype=torch.float64)
    assert torch.equal(result[1], third)
    assert torch.equal(result[3], third)
    assert combined_error(torch.eye(3, dtype=torch.float64).expand(2, 3, 3), result[[0, 2]], healthy[[0, 2]]) <= SAME


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_language_gets_everything_and_none_gets_nothing(rule: str, kind: str) -> None:
    gram = gram_of(make_rows(kind, 2, 4, torch.Generator().manual_seed(torch.seed() % 2**32)))
    mask = torch.tensor([[False, False, True, False], [False] * 4])
    assert torch.equal(weights(gram, rule, mask), mask.to(torch.float64))


@pytest.mark.parametrize("rule", ["mgda", "cagrad"])
def test_a_zero_row_freezes_the_block(rule: str) -> None:
    rows = make_rows("random", 3, 4, torch.Generator().manual_seed(torch.seed() % 2**32)).abs()
    rows[:, 1] = 0.0
    assert float((weights(gram_of(rows), rule).unsqueeze(-1) * rows).sum(-2).norm(dim=-1).max()) == 0.0


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=("random", "common direction", "badly scaled"), least=2), st.sampled_from(RULES))
def test_normalize_unit_equals_the_rule_on_unit_rows(rows: Tensor, rule: str) -> None:
    norms = rows.norm(dim=-1)
    unit = rows / norms.unsqueeze(-1)
    # Rows of the median norm, the lower one of two; here every block has a single K.
    shown = weights(gram_of(rows), rule, normalize="unit") * norms / norms.median(-1, keepdim=True).values
    assert combined_error(unit, shown, weights(gram_of(unit), rule)) <= SAME


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=("random", "common direction")), st.sampled_from(RULES), st.floats(1e-3, 1e3))
def test_rows_of_equal_norm_get_the_same_weights_with_normalize(rows: Tensor, rule: str, length: float) -> None:
    """So the averaging convention is kept: learning rates mean the same."""
    equal = length * rows / rows.norm(dim=-1, keepdim=True)
    plain, unit = weights(gram_of(equal), rule), weights(gram_of(equal), rule, normalize="unit")
    assert combined_error(equal, plain, unit) <= SAME
    if rule == "mean":
        torch.testing.assert_close(unit, plain, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=("random", "common direction")), st.sampled_from(RULES), st.floats(1.0, 1e6), st.integers(0, 5))
def test_one_language_s_spike_scales_no_other(rows: Tensor, rule: str, spike: float, which: int) -> None:
    """Its row grows, and its weight falls by as much; the others' weights grow by no more than to the next of their
    norms, and not at all where the language was above the middle already."""
    which %= rows.shape[1]
    grown = rows.clone()
    grown[:, which] *= spike
    before, after = (weights(gram_of(some), rule, normalize="unit") for some in (rows, grown))
    norms = rows.norm(dim=-1)
    others = torch.cat([norms[:, :which], norms[:, which + 1 :]], dim=-1)
    factor = grown.norm(dim=-1).median(-1, keepdim=True).values / norms.median(-1, keepdim=True).values
    assert bool((factor <= others.amax(-1, keepdim=True) / norms.median(-1, keepdim=True).values * (1 + 1e-12)).all())
    expected = before * factor
    expected[:, which] /= spike
    assert combined_error(grown, after, expected) <= SAME


def test_a_zero_row_does_not_count_for_the_norm() -> None:
    rows = torch.zeros(1, 4, 3, dtype=torch.float64)
    rows[0, 0, 0], rows[0, 1, 1], rows[0, 2, 2] = 8.0, 2.0, 4.0
    found = weights(gram_of(rows), "mean", normalize="unit")
    torch.testing.assert_close(found, torch.tensor([[0.125, 0.5, 0.25, 0.25]], dtype=torch.float64), rtol=1e-14, atol=0)


@settings(deadline=None, max_examples=examples(12))
@given(rows(kinds=("random", "common direction")), st.sampled_from(RULES))
def test_rescale_gives_the_norm_of_the_mean_row_and_keeps_the_direction(rows: Tensor, rule: str) -> None:
    gram = gram_of(rows)
    plain, scaled = weights(gram, rule), weights(gram, rule, rescale="mean")
    combined = (plain.unsqueeze(-1) * rows).sum(-2)
    result = (scaled.unsqueeze(-1) * rows).sum(-2)
    lasting = combined.norm(dim=-1) > 1e-4 * (plain.abs() * rows.norm(dim=-1)).sum(-1)
    wanted = rows.mean(-2).norm(dim=-1)
    # 1e-4 squared leaves 8 of float64's 16 digits.
    torch.testing.assert_close(result.norm(dim=-1)[lasting], wanted[lasting], rtol=1e-7, atol=0)
    factor = (wanted / combined.norm(dim=-1))[lasting].unsqueeze(-1)
    torch.testing.assert_close(scaled[lasting], plain[lasting] * factor, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_more_languages_than_a_kernel_takes(rule: str) -> None:
    """Two groups of equal rows: their weights are those of the two rows, shared out evenly, for rules without orders;
    and all rules are finite on rows of any kind. Problems are cut into several batches."""
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    copies = 45
    gram = gram_of(pair.repeat_interleave(copies, dim=1))
    w = weights(gram, rule)
    assert w.shape == (1, 2 * copies)
    assert bool(w.isfinite().all())
    if rule in UNORDERED:
        grouped = w.unflatten(1, (2, copies)).sum(-1)
        assert combined_error(pair, grouped, weights(gram_of(pair), rule)) < SAME, seed
    finite = weights(gram_of(torch.cat([make_rows(kind, 1, 66, generator) for kind in KINDS])), rule).isfinite().all(-1)
    assert bool(finite.all()), (dict(zip(KINDS, finite.tolist(), strict=True)), seed)


def test_solve_draws_alike_whatever_the_data() -> None:
    gram = gram_of(make_rows("random", 2, 3, torch.Generator().manual_seed(torch.seed() % 2**32)))
    states = []
    for blocks, mask in ((gram, True), (gram[:1] * float("nan"), True), (gram, False)):
        generator = torch.Generator().manual_seed(7)
        solve(blocks, torch.full(blocks.shape[:2], mask), create("pcgrad"), generator=generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
