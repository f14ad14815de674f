"""Grams across two halves of a language's micro-batches: which half, what is folded, and that noise is gone."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from draw import SEED, examples
from halves_by_rule import halves_by_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.test_engine import config, drive, plan, simulate, slot_of, table

from bucketmoo_ds import aggregate
from bucketmoo_ds.aggregate.nearest import nearest_semidefinite
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.pipeline.halves import Folding, shown
from bucketmoo_ds.pipeline.window import Window


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@st.composite
def slots(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    micro_steps, world_size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    one = st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 7, 64, 64, 64, 300]))
    return [[draw(one) for _ in range(world_size)] for _ in range(micro_steps)]


@settings(deadline=None, max_examples=examples(40))
@given(slots=slots(), how=st.sampled_from(["every", "apart"]))
def test_which_half(slots: list[list[tuple[int, int]]], how: str) -> None:
    window = Window(3, "language", once_a_window=how != "every", apart=how == "apart", crossed=True)
    found = []
    for row in slots:
        window.add([Slot(language, tokens, float(tokens)) for language, tokens in row])
        found.append([slot.half if slot.target_tokens else 0 for slot in window.latest])
    assert found == halves_by_rule(slots, sticks=how != "every", apart=True)
    for language in window.present:
        fed = [tokens for row in slots for of, tokens in row if of == language and tokens]
        halves = window.half_tokens[language]
        assert sum(halves) == sum(fed) == window.target_tokens[language]
        if how == "every":  # the last one of those that came was the lesser half's
            assert abs(halves[0] - halves[1]) <= max(fed)
        # A second half is there wherever there is a second micro-batch.
        assert (language in window.of_one_half) == (len(fed) == 1)


def test_the_ranks_of_a_node_have_one_half() -> None:
    window = Window(2, "language", once_a_window=False, crossed=True, together=2)
    window.add([Slot(0, 4, 4.0), Slot(0, 5, 5.0), Slot(0, 3, 3.0), Slot(0, 0, 0.0), Slot(1, 1, 1.0), Slot(1, 2, 2.0)])
    assert [slot.half for slot in window.latest] == [0, 0, 1, 1, 0, 0]
    window.add([Slot(0, 4, 4.0), Slot(1, 5, 5.0), Slot(0, 3, 3.0), Slot(0, 2, 2.0), Slot(1, 1, 1.0), Slot(1, 2, 2.0)])
    # By rank now, the largest first: 5 of language 1 to the empty half, then 2 and 1 to the lesser one.
    assert [slot.half for slot in window.latest] == [1, 1, 1, 0, 0, 0]
    assert window.half_tokens == [[11, 10], [6, 5]]


def test_a_rank_that_adds_up_keeps_a_half_as_long_as_both_have_something() -> None:
    window = Window(2, "language", once_a_window=True, apart=True, crossed=True)
    for _ in range(3):
        window.add([Slot(0, 5, 5.0), Slot(0, 5, 5.0), Slot(1, 5, 5.0)])
    assert [window.rows_of(rank) for rank in range(3)] == [[(0, 0)], [(0, 1)], [(1, 0), (1, 1)]]
    assert window.parts == 2


def parts_of(draws: int, means: Tensor, noise: Tensor) -> tuple[Tensor, Folding, Tensor]:
    """Returns, of so many windows, the Grams of the parts `[draws, R, R]`, how they fold, and the rows. Languages 0
    and 1 have three micro-batches each, of unequal size, language 2 one."""
    tokens = {(0, 0): [9, 3], (0, 1): [5], (1, 0): [4], (1, 1): [2, 2], (2, 0): [7]}
    halves = [[12, 5], [4, 4], [7, 0]]
    draw, parts = generator(), []
    for (language, _), fed in tokens.items():
        each = [
            means[language]
            + noise[language] / n**0.5 * torch.randn(draws, means.shape[1], generator=draw, dtype=torch.float64)
            for n in fed
        ]
        parts.append(sum(n * one for n, one in zip(fed, each, strict=True)) / sum(halves[language]))
    rows = list(tokens)
    stored = torch.stack(parts, 1)
    whole = torch.stack([sum(parts[rows.index(row)] for row in rows if row[0] == each) for each in range(3)], 1)
    return stored @ stored.mT, Folding.of(rows, [0, 1, 2], halves, torch.device("cpu")), whole


def test_the_folded_gram_is_unbiased_and_the_plain_one_is_not() -> None:
    means = torch.randn(3, 6, generator=generator(), dtype=torch.float64)
    noise = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)
    draws = 2000
    parts, folding, whole = parts_of(draws, means, noise)
    crossed, noisy = folding.fold(parts)
    torch.testing.assert_close(noisy, whole @ whole.mT, rtol=1e-12, atol=1e-12)

    def off_by(grams: Tensor) -> Tensor:
        return (grams.mean(0) - means @ means.T).abs() / (grams.std(0) / draws**0.5)

    # 4.5 standard errors of 8 entries: a right Gram fails once in 10,000 runs.
    right = off_by(crossed)
    right[2, 2] = 0.0
    assert (right < 4.5).all(), (SEED, right)
    assert (off_by(noisy).diagonal() > 4.5).all(), (SEED, off_by(noisy))
    assert torch.equal(crossed[:, 2, 2], noisy[:, 2, 2]), "one micro-batch: with its noise"


def test_the_rule_sees_the_nearest_semidefinite_gram_in_units_of_the_rows() -> None:
    means = torch.randn(3, 6, generator=generator(), dtype=torch.float64)
    scales = torch.tensor([1.0, 1e4, 1e-3], dtype=torch.float64)
    parts, folding, _ = parts_of(50, means, torch.full((3,), 6.0, dtype=torch.float64))
    crossed, noisy = folding.fold(parts)
    assert (torch.linalg.eigvalsh(crossed)[:, 0] < 0).any(), "or there is nothing to project"
    found = shown(crossed, noisy)
    assert (torch.linalg.eigvalsh(found)[:, 0] >= -1e-12 * found.diagonal(dim1=1, dim2=2).amax(1)).all()
    both = scales.outer(scales)
    scaled = shown(crossed * both, noisy * both)
    # Two roundings of factors, then those of some hundred rotations of unit columns.
    assert ((scaled / both - found).abs() <= 1e-12 * noisy.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]).all()


@pytest.mark.parametrize("count", [1, 2, 3, 6, 16])
def test_nearest_semidefinite(count: int) -> None:
    matrix = torch.randn(8, count, count, generator=generator(), dtype=torch.float64)
    matrix = matrix + matrix.mT
    matrix[3] = matrix[3] @ matrix[3]
    matrix[4] = 0.0
    values, vectors = torch.linalg.eigh(matrix)
    expected = (vectors * values.clamp(min=0.0).unsqueeze(-2)) @ vectors.mT
    found = nearest_semidefinite(matrix)
    # Rotations and LAPACK both keep some units of 2^-52 of the largest eigenvalue.
    # Rotations and LAPACK both keep some units of 2^-52 of the largest eigenvalue, and of the matrix's bound.
    assert ((found - expected).abs().flatten(1).amax(1) <= 1e-12 * values.abs().amax(1)).all()
    assert torch.equal(found, torch.cat([nearest_semidefinite(one[None]) for one in matrix])), "alone or among others"
    matrix[1, 0, 0] = float("nan")
    poisoned = nearest_semidefinite(matrix)
    assert torch.equal(poisoned[2:], found[2:])
    assert not poisoned[1].isfinite().all()


RULES = tuple(
    name
    for name in aggregate.names()
    if name not in ("anchor", "static", "random", "adasum") and not aggregate.find(name).uses_losses
)


@pytest.mark.parametrize("rule", RULES)
def test_a_combined_row_is_no_longer_than_meant(rule: str) -> None:
    """A signal of a hundredth of the rows' lengths: what depends on lengths answers to the rows as they are."""
    draw = generator()
    rows = torch.randn(200, 4, 5, generator=draw, dtype=torch.float64)
    noise = torch.diag_embed(torch.rand(200, 4, generator=draw, dtype=torch.float64))
    gram = 1e-4 * (rows @ rows.mT)
    noisy = gram + noise

    def solved(noisy: Tensor | None, rescale: str = "none") -> Tensor:
        made = aggregate.create(rule)
        mask = torch.ones(200, 4, dtype=torch.bool)
        return aggregate.solve(gram, mask, made, noisy=noisy, rescale=rescale, generator=generator())

    def length(weights: Tensor, gram: Tensor) -> Tensor:
        return (weights * (gram @ weights.unsqueeze(-1)).squeeze(-1)).sum(1).clamp(min=0.0).sqrt()

    def longest(gram: Tensor) -> Tensor:
        return gram.diagonal(dim1=1, dim2=2).amax(1).sqrt()

    weights = solved(noisy)
    meant = length(solved(None), gram) / longest(gram)
    assert (length(weights, noisy) <= (1 + 1e-12) * longest(noisy) * meant.clamp(min=1.0)).all()
    # Without noise nothing changes, but where a length is rounded above its own limit.
    torch.testing.assert_close(solved(gram), solved(None), rtol=1e-12, atol=0)
    scaled = solved(noisy, "mean")
    moving = (scaled != 0).any(1)
    mean = noisy.sum((1, 2)).sqrt() / 4
    torch.testing.assert_close(length(scaled, noisy)[moving], mean[moving], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("mode", "together"), [("streaming", 1), ("deferred", 3)])
def test_a_single_micro_batch_is_counted_and_said_once(
    mode: str, together: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Two ranks of language 0 and one of language 1, in one micro-step: halves are ranks."""
    settings = config(gram="cross", mode=mode, aggregator="mgda")
    windows = [table([[(0, 9), (0, 5), (1, 7)]], SEED + number) for number in range(2)]
    with caplog.at_level(logging.WARNING, logger="bucketmoo_ds"):
        first, *_ = simulate(windows, settings, plan())
    said = [record.message for record in caplog.records if "one micro-batch only" in record.message]
    assert len(said) == 1
    assert "l1 had" in said[0]
    assert first.moo.counters["one_half.l1"] == 2
    assert "one_half.l0" not in first.moo.counters
    plain, *_ = simulate(windows, dataclasses.replace(settings, gram="plain"), plan())
    for ours, theirs in zip(first.resolutions, plain.resolutions, strict=True):
        off = torch.ones(4, 4, dtype=torch.bool).fill_diagonal_(False)
        # Rows of two micro-batches are added up in float32 there, and here in float64 as products: a rounding each.
        torch.testing.assert_close(ours.gram[:, off], theirs.gram[:, off], rtol=0, atol=1e-5 * float(theirs.gram.max()))
        torch.testing.assert_close(ours.gram[:, 1, 1], theirs.gram[:, 1, 1], rtol=1e-6, atol=0)
        assert (ours.gram[:, 0, 0] < theirs.gram[:, 0, 0]).all(), "noise was there"
    assert ("twice the rows" in first.moo.describe()) == (mode == "deferred")
    if mode == "deferred":
        # Three rows where plain Grams have two.
        assert first.moo.row_bytes * 2 == plain.moo.row_bytes * 3


def test_a_half_that_is_not_finite_names_its_language_and_bucket() -> None:
    windows = [table([[(0, 9), (0, 5)], [(1, 7), (1, 7)]], SEED)]
    windows[0][0][1].gradient["layers.1.a"].fill_(float("inf"))
    for outcome in simulate(windows, config(gram="cross", granularity="model"), plan("model")):
        names = outcome.resolutions[0].nonfinite
        assert {language for language, _ in names} == {"l0"}
        assert len({bucket for _, bucket in names}) == 1


def test_one_rank_that_adds_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'gram = "cross": one rank that adds up .* leave once_a_window out'):
        drive(Exchange(), [table([[(0, 9)], [(0, 5)]], SEED)], config(gram="cross"), plan(), once_a_window=True)


def test_an_abandoned_window_leaves_no_half_behind() -> None:
    settings, window = config(gram="cross"), table([[(0, 9)], [(0, 5)], [(1, 7)], [(1, 3)]], SEED)
    moo = BucketMOO(settings, plan(), Exchange(), lambda *_: None, micro_steps=lambda: 4, once_a_window=False)
    moo.begin_micro_step(slot_of(window[0][0], 4), False)
    moo.abandon()
    assert moo.window.rows == []
    assert moo.window.half_tokens == [[0, 0]] * 4


@pytest.mark.parametrize("normalize", ["none", "loss"])
def test_losses_are_those_of_whole_languages(normalize: str) -> None:
    """`stch` knows losses alone: two halves of a language are still one."""
    windows = [table([[(0, 9), (1, 5)], [(0, 4), (2, 7)]], SEED)]
    found = [
        simulate(windows, config(gram=gram, aggregator="stch", normalize=normalize), plan())[0].resolutions[0]
        for gram in ("plain", "cross")
    ]
    # A sum over the ranks and a quotient each.
    torch.testing.assert_close(found[1].weights, found[0].weights, rtol=1e-12, atol=0)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-12)
