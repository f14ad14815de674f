"""The reference itself, against sums written out by hand: all other tests lean on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds import aggregate
from bucketmoo_ds.reference import MicroGradient, resolve_window

BLOCKS = {"first": ["a", "b"], "second": ["c"]}


def micro(language: int, tokens: int, **gradient: list[float]) -> MicroGradient:
    return MicroGradient(language, tokens, {name: torch.tensor(values) for name, values in gradient.items()})


def resolve(micros: list[MicroGradient], name: str, micro_steps: int = 1, **options: str) -> tuple[dict, dict]:
    return resolve_window(micros, BLOCKS, micro_steps=micro_steps, aggregator=aggregate.create(name), **options)


def test_by_hand() -> None:
    """Block `first`: rows (2, 0) and (0, 1), whose min-norm point is 0.2 and 0.8 of them. `second`: (1) and (1)."""
    micros = [micro(0, 5, a=[2.0], b=[0.0], c=[1.0]), micro(1, 9, a=[0.0], b=[1.0], c=[1.0])]
    combined, weights = resolve(micros, "mgda")
    torch.testing.assert_close(weights["first"], torch.tensor([0.2, 0.8], dtype=torch.float64))
    torch.testing.assert_close(combined["a"], torch.tensor([0.4], dtype=torch.float64))
    torch.testing.assert_close(combined["b"], torch.tensor([0.8], dtype=torch.float64))
    torch.testing.assert_close(combined["c"], torch.tensor([1.0], dtype=torch.float64))


def test_rows_are_means_over_the_languages_tokens() -> None:
    """Two micro-steps: gradients come divided by 2. Language 0: (1 * 10 + 3 * 20) / 4 = 17.5."""
    micros = [
        micro(0, 1, a=[5.0], b=[0.0], c=[0.0]),
        micro(0, 3, a=[10.0], b=[0.0], c=[0.0]),
        micro(2, 6, a=[-1.0], b=[0.0], c=[4.0]),
        micro(1, 0, a=[float("nan")], b=[float("nan")], c=[float("nan")]),
    ]
    combined, weights = resolve(micros, "mean", micro_steps=2)
    assert weights["first"].tolist() == [0.5, 0.5]
    assert combined["a"].item() == (17.5 - 2.0) / 2
    assert combined["c"].item() == (0.0 + 8.0) / 2
    combined, _ = resolve(micros, "mean", micro_steps=2, weighting="token")
    # Over all ten tokens: (1 * 10 + 3 * 20 + 6 * -2) / 10. float64, a few factors.
    assert combined["a"].item() == pytest.approx(5.8, rel=1e-14)
    assert combined["c"].item() == pytest.approx(6 * 8 / 10, rel=1e-14)


@settings(deadline=None, max_examples=30)
@given(
    slots=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 99)), min_size=1, max_size=6),
    micro_steps=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_min_norm_descends_for_every_language_in_every_block(
    slots: list[tuple[int, int]], micro_steps: int, seed: int
) -> None:
    """<g_i, d> >= ||d||^2, block by block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 7)}
    micros = [
        MicroGradient(language, tokens, {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()})
        for language, tokens in slots
    ]
    combined, weights = resolve(micros, "mgda", micro_steps)
    means = {
        language: resolve([micro for micro in micros if micro.language == language], "mean", micro_steps)[0]
        for language, _ in slots
    }
    for block, names in BLOCKS.items():
        assert weights[block].shape == (len(means),)
        d = torch.cat([combined[name].flatten() for name in names])
        for mean in means.values():
            row = torch.cat([mean[name].flatten() for name in names])
            # The solver stops at a gap of rounding size; relative to the largest row.
            assert float(row @ d) >= float(d @ d) - 1e-6 * float(row.norm() + d.norm()) ** 2
    for name, shape in shapes.items():
        assert combined[name].shape == shape
        assert combined[name].dtype == torch.float64


@settings(deadline=None, max_examples=30)
@given(tokens=st.lists(st.integers(1, 99), min_size=2, max_size=2), seed=st.integers(0, 2**32))
def test_granularity_matters(tokens: list[int], seed: int) -> None:
    """One block over everything is not the same method: its weights are equal everywhere."""
    generator = torch.Generator().manual_seed(seed)
    micros = [
        MicroGradient(i, n, {name: torch.randn(9, generator=generator) for name in "abc"}) for i, n in enumerate(tokens)
    ]
    rule = aggregate.create("mgda")
    _, apart = resolve_window(micros, BLOCKS, micro_steps=1, aggregator=rule)
    _, one = resolve_window(micros, {"model": ["a", "b", "c"]}, micro_steps=1, aggregator=rule)
    assert set(apart) == {"first", "second"}
    rows = torch.stack([torch.cat([m.gradient[name].double() for name in "abc"]) for m in micros])
    expected = aggregate.weights(rows @ rows.T, "mgda")
    torch.testing.assert_close(one["model"], expected, rtol=1e-9, atol=1e-12)
    first = rows[:, :18]
    torch.testing.assert_close(apart["first"], aggregate.weights(first @ first.T, "mgda"), rtol=1e-9, atol=1e-12)


def random_rows(seed: int, count: int, size: int, spread: float) -> tuple[torch.Tensor, list[MicroGradient]]:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (spread * torch.rand(count, 1, generator=generator, dtype=torch.float64))
    rows = torch.randn(count, size, generator=generator, dtype=torch.float64) * scales
    return rows, [MicroGradient(index, 3, {"a": row}) for index, row in enumerate(rows)]


def two_rows(gram: torch.Tensor) -> torch.Tensor:
    """The point of the segment between two rows that is nearest to 0."""
    first = ((gram[1, 1] - gram[0, 1]) / (gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])).clamp(0.0, 1.0)
    return torch.stack([first, 1.0 - first])


def by_quadprog(gram: torch.Tensor) -> torch.Tensor:
    quadprog = pytest.importorskip("quadprog")
    count = len(gram)
    constraints = torch.cat([torch.ones(count, 1, dtype=torch.float64), torch.eye(count, dtype=torch.float64)], dim=1)
    bounds = torch.eye(1, count + 1, dtype=torch.float64)[0]
    linear = torch.zeros(count, dtype=torch.float64)
    return torch.tensor(quadprog.solve_qp(gram.numpy(), linear.numpy(), constraints.numpy(), bounds.numpy(), 1)[0])


@settings(deadline=None, max_examples=40)
@given(
    oracle=st.sampled_from([two_rows, by_quadprog]),
    count=st.integers(2, 5),
    normalize=st.sampled_from(["none", "l2"]),
    rescale=st.sampled_from(["none", "mean"]),
    seed=st.integers(0, 2**32),
)
def test_other_people_s_min_norm_gives_what_ours_gives(
    oracle: Callable[[torch.Tensor], torch.Tensor], count: int, normalize: str, rescale: str, seed: int
) -> None:
    rows, micros = random_rows(seed, 2 if oracle is two_rows else count, 12, spread=1.0)
    options = {"normalize": normalize, "rescale": rescale}
    combined, _ = resolve_window(micros, {"all": ["a"]}, micro_steps=1, aggregator=oracle, **options)
    # The package's own way, of which the reference uses nothing.
    ours = aggregate.weights(rows @ rows.T, "mgda", **options) @ rows
    # Of norms within a factor of 10: exact up to rounding times the condition of the Gram. A combined row that has
    # all but vanished gets its length from digits that are gone, so that errors are relative to the rows.
    assert float((combined["a"] - ours).norm()) <= 1e-6 * float(rows.norm())


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["mean", "mgda", "pcgrad", "cagrad", "upgrad"]),
    count=st.integers(1, 5),
    normalize=st.sampled_from(["none", "l2"]),
    rescale=st.sampled_from(["none", "mean"]),
    zero=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_masks_norms_and_lengths_are_the_package_s(
    name: str, count: int, normalize: str, rescale: str, zero: bool, seed: int
) -> None:
    rows, micros = random_rows(seed, count, 12, spread=2.0)
    if zero:
        rows[0] = 0.0
    options = {"normalize": normalize, "rescale": rescale}
    rule = aggregate.create(name)
    combined, _ = resolve_window(micros, {"all": ["a"]}, micro_steps=1, aggregator=rule, seed=seed % 1000, **options)
    ours = aggregate.weights(rows @ rows.T, name, seed=seed % 1000, **options) @ rows
    assert float((combined["a"] - ours).norm()) <= 1e-6 * float(rows.norm())


def test_rows_that_are_not_finite_are_averaged() -> None:
    micros = [micro(0, 1, a=[float("inf")], b=[0.0], c=[1.0]), micro(1, 1, a=[1.0], b=[1.0], c=[1.0])]
    combined, weights = resolve(micros, "mgda")
    assert weights["first"].tolist() == [0.5, 0.5]
    assert combined["c"].item() == 1.0


def test_options_and_seed_reach_the_solver() -> None:
    generator = torch.Generator().manual_seed(7)
    micros = [
        MicroGradient(i, 5, {name: torch.randn(4, generator=generator) * 10**i for name in "abc"}) for i in range(4)
    ]
    rows = torch.stack([m.gradient["c"].double() for m in micros])
    for name in ("mgda", "pcgrad"):
        for options in ({"normalize": "l2"}, {"rescale": "mean"}, {"seed": 3}):
            _, found = resolve(micros, name, **options)
            expected = aggregate.weights(rows @ rows.T, name, **options)
            torch.testing.assert_close(found["second"], expected, rtol=1e-9, atol=1e-12)
