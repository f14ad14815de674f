"""SDMGrad: its descent by the definition, window after window, and where it ends."""

from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.aggregate.grams import combined_error, gram_of, make_rows, rows, times

from bucketmoo_ds.aggregate import create, first_state, solve, weights
from bucketmoo_ds.aggregate.sdmgrad import onto_simplex
from bucketmoo_ds.errors import ConfigError

EASY = ("random", "common direction")


def nearest(point: np.ndarray) -> np.ndarray:
    """The projection onto the simplex, as a quadratic problem."""
    count = len(point)
    constraints = np.hstack([np.ones((count, 1)), np.eye(count)])
    return quadprog.solve_qp(np.eye(count), point, constraints, np.eye(1, count + 1)[0], 1)[0]


@settings(deadline=None, max_examples=examples(8))
@given(rows(kinds=EASY), st.floats(0.0, 2.0), st.integers(1, 20))
def test_it_is_what_the_definition_says_window_after_window(rows: Tensor, regularization: float, steps: int) -> None:
    gram = gram_of(rows)
    count = gram.shape[-1]
    rule = create("sdmgrad", regularization=regularization, steps=steps)
    state = {name: each.expand(len(gram), *each.shape) for name, each in first_state(rule, count, 0.0).items()}
    descended = [np.full(count, 1.0 / count) for _ in gram]
    for scale in (1.0, 3.7):
        found = solve(
            scale * gram, torch.ones(gram.shape[:2], dtype=torch.bool), rule, state=state, generator=torch.Generator()
        )
        for number, block in enumerate(gram.numpy()):
            eta, w = 1.0 / np.abs(block).sum(1).max(), descended[number]
            for _ in range(steps):
                w = nearest(w - eta * block @ (w + regularization / count))
            descended[number] = w
            expected = (w + regularization / count) / (1.0 + regularization)
            # Twenty projections that quadprog has right to rounding; a step contracts what the one before had wrong.
            np.testing.assert_allclose(found[number].numpy(), expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=examples(6))
@given(rows(kinds=("random",)), st.floats(0.0, 2.0))
def test_it_goes_down_to_the_shortest_vector_drawn_towards_the_mean(rows: Tensor, regularization: float) -> None:
    gram = gram_of(rows)
    count = gram.shape[-1]
    constraints, bounds = np.hstack([np.ones((count, 1)), np.eye(count)]), np.eye(1, count + 1)[0]
    towards = np.full(count, regularization / count)
    solutions = [quadprog.solve_qp(block, -block @ towards, constraints, bounds, 1)[0] for block in gram.numpy()]
    best = (torch.tensor(np.array(solutions)) + regularization / count) / (1.0 + regularization)
    squares = []
    for steps in (1, 5, 20, 100, 1000):
        w = weights(gram, "sdmgrad", regularization=regularization, steps=steps)
        squares.append((w * times(gram, w)).sum(-1))
    least = (best * times(gram, best)).sum(-1)
    for longer, shorter in zip(squares, [*squares[1:], least], strict=True):
        assert (shorter <= longer * (1 + 1e-9)).all(), "the square never grows, and none is below the least"
    # Smooth and convex: after t steps at most L |w_0 - w|^2 / 2 t above half of it, |w_0 - w|^2 at most 2.
    bound = gram.abs().sum(-1).amax(-1) / 1000 / (1.0 + regularization) ** 2
    assert (squares[-1] - least <= 2 * bound).all()


def test_much_regularization_is_the_mean() -> None:
    gram = gram_of(make_rows("random", 4, 5, torch.Generator().manual_seed(torch.seed() % 2**32)))
    close = weights(gram, "sdmgrad", regularization=1e9)
    torch.testing.assert_close(close, weights(gram, "mean"), rtol=0, atol=1e-8)


def test_onto_simplex() -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    point = 3.0 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, 6, generator=generator) < 0.7
    mask[0] = False
    found = onto_simplex(point, mask)
    assert bool((found[~mask] == 0.0).all())
    assert combined_error(torch.eye(6).double().expand(40, 6, 6), found[:1], found[:1] * 0.0) == 0.0
    for each, on, ours in zip(point[1:], mask[1:], found[1:], strict=True):
        if on.any():
            np.testing.assert_allclose(ours[on].numpy(), nearest(each[on].numpy()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2.0}, {"steps": True}, {"regularization": -0.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match='aggregator "sdmgrad"'):
        create("sdmgrad", **options)
