"""Rules that keep something from window to window: TorchJD's, window by window, and what each promises."""

from __future__ import annotations

from typing import Any

import cvxpy
import pytest
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import GradVacWeighting, PCDWeighting
from unit.aggregate.grams import KINDS, combined_error, gram_of, make_rows, rows, times

from bucketmoo_ds.aggregate import State, create, solve, weights
from bucketmoo_ds.errors import ConfigError

seeds = st.integers(0, 2**32 - 1)
RULES: dict[str, dict[str, Any]] = {
    "anchor": {"primary": [1, 0], "tau": 0.5, "beta": 0.75},
    "gradvac": {"beta": 0.25},
    "sdmgrad": {"regularization": 0.1, "steps": 3},
}


def first(rule: Any, blocks: int, languages: int) -> State:
    return {name: each.expand(blocks, *each.shape) for name, each in rule.start(languages).items()}


def run(rule: str, windows: list[Tensor], masks: list[Tensor] | None = None, seed: int = 0, **options: Any) -> Tensor:
    """Returns the weights of every window, `[windows, B, K]`, of a run through these Grams."""
    made = create(rule, **options)
    state = first(made, *windows[0].shape[:2])
    masks = masks or [torch.ones(gram.shape[:2], dtype=torch.bool) for gram in windows]
    return torch.stack([
        solve(gram, mask, made, state=state, generator=torch.Generator().manual_seed(seed))
        for gram, mask in zip(windows, masks, strict=True)
    ])  # fmt: skip


def windows_of(kind: str, blocks: int, languages: int, seed: int, count: int = 4) -> list[Tensor]:
    """Returns rows `[B, K, S]` of some windows, each language's of another size in each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [10.0 ** (2.0 * torch.rand(blocks, languages, 1, generator=generator).double() - 1.0) for _ in range(count)]
    return [size * make_rows(kind, blocks, languages, generator) for size in sizes]


@settings(deadline=None, max_examples=examples(6))
@given(
    st.sampled_from(KINDS),
    st.integers(2, 6),
    seeds,
    st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    st.sampled_from((0.0, 0.5, 0.999)),
)
def test_anchor_equals_torchjd(kind: str, languages: int, seed: int, tau: float, beta: float) -> None:
    # TorchJD's moving averages know the scale of a window, which ours take from it: here all windows have one.
    windows = [each / each.square().sum((1, 2), keepdim=True).sqrt() for each in windows_of(kind, 3, languages, seed)]
    ours = run("anchor", [gram_of(each) for each in windows], primary=0, tau=tau, beta=beta)
    oracles = [PCDWeighting(tau=tau, beta=beta, eps=0.0) for _ in range(3)]
    for window, of_blocks in enumerate(windows):
        grams = zip(oracles, gram_of(of_blocks), strict=True)
        expected = torch.stack([oracle(gram) for oracle, gram in grams])
        # Both add rows until the shares are there up to 1e-9 of the longest normalised row.
        assert combined_error(of_blocks, ours[window], expected) <= 1e-6


@settings(deadline=None, max_examples=examples(3))
@given(rows(kinds=("random",), least=3, blocks=1), st.floats(0.01, 1.0))
def test_anchor_is_the_nearest_vector_in_the_full_space(rows: Tensor, tau: float) -> None:
    """Two primary languages: the mean of their normalised rows is followed, at the length of the mean of their rows."""
    (block,) = rows
    unit = block / block.norm(dim=-1, keepdim=True)  # a first window's averages are its own norms
    target, length = unit[:2].mean(0), float(block[:2].mean(0).norm())
    direction = cvxpy.Variable(block.shape[1])
    shares = unit[2:].numpy() @ direction >= tau
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(direction - target.numpy())), [shares]).solve(cvxpy.CLARABEL)
    expected = torch.tensor(direction.value)
    ours = (weights(gram_of(rows), "anchor", primary=[0, 1], tau=tau)[0].unsqueeze(-1) * block).sum(0)
    # An interior-point method's accuracy.
    torch.testing.assert_close(ours, expected / expected.norm() * length, rtol=0.0, atol=1e-5 * length)


@settings(deadline=None, max_examples=examples(6))
@given(rows(least=2), st.just(0.0) | st.floats(1e-3, 1.0))
def test_anchor_leaves_every_other_language_its_share(rows: Tensor, tau: float) -> None:
    gram, norms = gram_of(rows), rows.norm(dim=-1)
    w = weights(gram, "anchor", primary=0, tau=tau)
    gains = times(gram, w) / norms  # per unit of each row
    before = w[:, :1] * norms[:, :1]  # |d| over the length that d had before: w_0 was 1 / |g_0| there
    alone = (w[:, 1:] == 0.0).all(-1, keepdim=True)  # nothing is added: h_1 has the shares, or no d has all of them
    parts = (w.abs() * norms).sum(-1, keepdim=True)
    assert bool((alone | (gains[:, 1:] >= tau * before - 1e-7 * parts).all(-1, keepdim=True)).all())
    moves = (w != 0.0).any(-1)  # where no d but 0 serves all, and no share is asked for, it is 0
    torch.testing.assert_close((w * times(gram, w)).sum(-1).sqrt()[moves], norms[moves, 0], rtol=1e-5, atol=0.0)
    assert bool((moves | (tau == 0.0)).all())


def test_anchor_where_there_is_little_to_follow() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert weights(gram_of(rows), "anchor", primary=0).tolist() == [1.0, 0.0, 0.0], "no d serves both"
    assert weights(gram_of(rows[:2] * torch.tensor([[0.0], [1.0]])), "anchor", primary=0).tolist() == [0.0, 0.0]
    assert weights(gram_of(rows[:2] * torch.tensor([[1.0], [0.0]])), "anchor", primary=0).tolist() == [1.0, 0.0]
    assert weights(torch.zeros(3, 3), "anchor", primary=0).tolist() == [0.0] * 3
    turned = weights(gram_of(rows[:2]), "anchor", primary=0, tau=1.0)
    torch.testing.assert_close(turned, torch.full((2,), 0.5**0.5, dtype=torch.float64), rtol=1e-9, atol=0.0)
    against = weights(gram_of(rows[1:]), "anchor", primary=0, tau=1.0)
    torch.testing.assert_close(against, torch.tensor([1.0, 2.0]).double(), rtol=1e-9, atol=0.0, msg="uphill for it")
    # No primary language took part: all that did count as one, and none is left to be given a share.
    rule = create("anchor", primary="ko").at(["de", "fr", "ko"], [0, 1], [0])
    gram = gram_of(rows[:2])[None].double()
    found = solve(gram, torch.ones(1, 2, dtype=torch.bool), rule, generator=torch.Generator())
    torch.testing.assert_close(found, torch.full((1, 2), 0.5).double(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("primary", "message"),
    [
        ("dev", 'no language of this run; did you mean "deu"?'),
        (["deu", 7], "no number of 3 languages"),
        ([], "at least one"),
        (True, "expected the name"),
        ([1.5], "expected the name"),
    ],
)
def test_primaries_that_are_no_languages_are_refused(primary: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"primary: .*{message.replace('?', '.')}"):
        create("anchor", primary=primary).at(["deu", "fra", "kor"], [0, 1, 2], [0])


def test_primaries_by_name_need_names() -> None:
    with pytest.raises(ConfigError, match="have no names here"):
        weights(torch.eye(2), "anchor", primary="de")


@settings(deadline=None, max_examples=examples(6))
@given(st.sampled_from(("random", "common direction")), seeds, st.floats(0.0, 0.9))
def test_gradvac_of_two_languages_equals_torchjd(kind: str, seed: int, beta: float) -> None:
    """With one other language there is no order to draw."""
    grams = [gram_of(each) for each in windows_of(kind, 3, 2, seed)]
    ours = run("gradvac", grams, beta=beta)
    oracles = [GradVacWeighting(beta=beta, eps=0.0) for _ in range(3)]
    for window, gram in enumerate(grams):
        expected = torch.stack([oracle(block) for oracle, block in zip(oracles, gram, strict=True)]) / 2
        torch.testing.assert_close(ours[window], expected, rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=examples(6))
@given(st.sampled_from(("random", "common direction")), st.integers(3, 5), seeds)
def test_gradvac_equals_the_paper_s_algorithm_on_the_rows(kind: str, languages: int, seed: int) -> None:
    windows = windows_of(kind, 2, languages, seed)
    ours = run("gradvac", [gram_of(each) for each in windows], seed=seed, beta=0.5)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(languages, generator=generator).tolist() for _ in range(languages)]
    for block in range(2):
        targets = torch.zeros(languages, languages, dtype=torch.float64)
        for window, of_blocks in enumerate(windows):
            total = torch.zeros_like(of_blocks[block, 0])
            for language, order in enumerate(orders):
                row = of_blocks[block, language].clone()
                for other in order:
                    if other == language:
                        continue
                    g, target = of_blocks[block, other], float(targets[language, other])
                    cosine = float(row @ g / row.norm() / g.norm())
                    if cosine < target:
                        more = target * (1.0 - cosine**2) ** 0.5 - cosine * (1.0 - target**2) ** 0.5
                        row = row + float(row.norm() / g.norm()) * more / (1.0 - target**2) ** 0.5 * g
                        torch.testing.assert_close(float(row @ g / row.norm() / g.norm()), target, rtol=0.0, atol=1e-9)
                    targets[language, other] = 0.5 * target + 0.5 * cosine
                total += row / languages
            found = (ours[window, block].unsqueeze(-1) * of_blocks[block]).sum(0)
            # Rounding, times what a row has grown by.
            assert float((found - total).norm() / of_blocks[block].norm()) <= 1e-9


def test_gradvac_s_first_window_is_pcgrad_s() -> None:
    gram = gram_of(make_rows("random", 8, 5, torch.Generator().manual_seed(torch.seed() % 2**32)))
    torch.testing.assert_close(weights(gram, "gradvac", seed=3), weights(gram, "pcgrad", seed=3), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=examples(3))
@given(st.sampled_from(KINDS), seeds)
def test_a_run_depends_on_no_scale_and_no_other_block(rule: str, kind: str, seed: int) -> None:
    grams = [gram_of(each) for each in windows_of(kind, 4, 4, seed)]
    masks = [torch.rand(4, 4, generator=torch.Generator().manual_seed(seed + number)) < 0.7 for number in range(4)]
    whole = run(rule, grams, masks, seed, **RULES[rule])
    assert bool(whole.isfinite().all())
    # Powers of two change no digit.
    scaled = [gram * 2.0 ** (20 * number - 30) for number, gram in enumerate(grams)]
    assert torch.equal(run(rule, scaled, masks, seed, **RULES[rule]), whole)
    for block in range(4):
        one = slice(block, block + 1)
        alone = run(rule, [gram[one] for gram in grams], [mask[one] for mask in masks], seed, **RULES[rule])
        assert torch.equal(alone, whole[:, one])
    poisoned = [
        torch.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), gram, torch.nan)
        for gram, mask in zip(grams, masks, strict=True)
    ]
    assert torch.equal(run(rule, poisoned, masks, seed, **RULES[rule]), whole)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_enormous_whatever_a_gram_was_rounded_to(rule: str, dtype: torch.dtype) -> None:
    for kind in KINDS:
        windows = windows_of(kind, 4, 5, torch.seed() % 2**32)
        grams = [gram_of(each).to(dtype).double() for each in windows]
        for gram, w in zip(grams, run(rule, grams, **RULES[rule]), strict=True):
            assert bool(w.isfinite().all())
            norms = gram.diagonal(dim1=1, dim2=2).sqrt()
            # GradVac adds of one other row after the other at most 500 times what a row has become.
            assert float(((w.abs() * norms).sum(-1) / norms.amax(-1)).max()) <= (1e4 if rule == "anchor" else 1e7)
