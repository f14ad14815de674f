"""Rules whose weights follow from losses, against autograd of what they are the gradient of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds.aggregate import create, first_state, solve, weights
from bucketmoo_ds.errors import ConfigError

numbers = st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None, max_examples=examples(20))
@given(numbers, st.floats(0.01, 10.0), numbers, numbers)
def test_stch_is_the_gradient_of_the_smooth_maximum(
    told: list[float], mu: float, preference: list[float], z: list[float]
) -> None:
    losses = float64(*told).requires_grad_()
    scale = float64(*preference) / float64(*preference).mean()
    (mu * (scale * (losses - float64(*z)) / mu).logsumexp(0)).backward()
    gram = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    found = weights(gram, "stch", losses=told, preference=preference, mu=mu, z=z)
    assert losses.grad is not None
    torch.testing.assert_close(found, losses.grad.expand(2, 4), rtol=1e-9, atol=1e-300)


def test_stch_goes_from_averaging_to_the_largest_loss() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    told, mask = [2.0, 3.0, 4.0], [True, True, False]
    torch.testing.assert_close(weights(gram, "stch", losses=told, mu=1e5), float64(1, 1, 1) / 3, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights(gram, "stch", losses=told, mu=1e-2), float64(0, 0, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(gram, "stch", mask, losses=told, mu=1e-2), float64(0, 1, 0), rtol=0, atol=1e-12)
    assert torch.equal(weights(gram, "stch", losses=[5.0] * 3), weights(gram, "mean"))


def run_famo(windows: list[list[float]], masks: list[list[bool]] | None = None, **options: float) -> Tensor:
    """Returns `[windows, K]`."""
    rule = create("famo", **options)
    count = len(windows[0])
    state = {name: each.expand(2, *each.shape) for name, each in first_state(rule, count, 0.0).items()}
    gram, found = torch.eye(count, dtype=torch.float64).expand(2, count, count), []
    for number, told in enumerate(windows):
        on = torch.ones(2, count, dtype=torch.bool) & torch.tensor(masks[number] if masks else [True] * count)
        w = solve(gram, on, rule, losses=float64(*told), state=state, generator=torch.Generator())
        assert torch.equal(w[0], w[1])
        found.append(w[0])
    return torch.stack(found)


@settings(deadline=None, max_examples=examples(8))
@given(st.lists(numbers, min_size=2, max_size=6), st.floats(1e-3, 0.5), st.sampled_from([0.0, 1e-5, 1e-2]))
def test_famo_is_the_authors_formulas_by_autograd_and_torch_s_adam(
    windows: list[list[float]], lr: float, decay: float
) -> None:
    xi = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=lr, weight_decay=decay)
    found = run_famo(windows, lr=lr, decay=decay)
    for number, told in enumerate(windows):
        if number:
            delta = float64(*windows[number - 1]).log() - float64(*told).log()
            (xi.grad,) = torch.autograd.grad(xi.softmax(0), xi, delta)
            # Adam divides by the size of what may be 0 but for rounding: then the direction is anybody's.
            if float(xi.grad.abs().min()) < 1e-12:
                return
            adam.step()
        losses = float64(*told).requires_grad_()
        z = xi.detach().softmax(0)
        ((z * losses.log()).sum() / (z / losses.detach()).sum()).backward()
        assert losses.grad is not None
        torch.testing.assert_close(found[number], losses.grad, rtol=1e-6, atol=1e-12)
    scaled = run_famo([[1e3 * each for each in told] for told in windows], lr=lr, decay=decay)
    torch.testing.assert_close(scaled, found, rtol=1e-6, atol=1e-9)


def test_famo_gives_more_to_what_falls_slowly_and_lets_the_absent_be() -> None:
    falling = [[2.0 * 0.9**number, 2.0 * 0.99**number] for number in range(30)]
    z = run_famo(falling) * torch.tensor(falling, dtype=torch.float64)
    z = z / z.sum(1, keepdim=True)
    assert bool((z[1:, 1] > z[:-1, 1]).all())
    # Two languages and a third that comes late: until then they are as without it, whatever it would have been told.
    alone = run_famo(falling)
    masks = [[True, True, number >= 20] for number in range(30)]
    for other in (1.0, float("nan")):
        told = [[*each, other if number < 20 else 3.0] for number, each in enumerate(falling)]
        beside = run_famo(told, masks)
        torch.testing.assert_close(beside[:20, :2], alone[:20], rtol=1e-12, atol=0)
        assert bool(beside.isfinite().all())
    # It is new, so that the others are moved by each other alone, and it stands where all began.
    new = beside[20] * float64(*falling[20], 3.0)
    torch.testing.assert_close(new[0] / new[1], alone[20, 0] * falling[20][0] / alone[20, 1] / falling[20][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0.0}, 'aggregator "stch": mu = 0.0: expected a number'),
        ({"z": -1.0}, 'aggregator "stch": z = -1.0: expected a number'),
        ({"z": {"de": 1.0}}, 'aggregator "stch": z = .*has no fr'),
        ({"z": [1.0, 2.0, 3.0]}, 'aggregator "stch": z = .*3 numbers for 2 languages'),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create("stch", **options).at(["de", "fr"], [0, 1], [0])


def test_a_rule_from_losses_needs_them() -> None:
    with pytest.raises(ConfigError, match="losses: missing; the aggregator needs a number for each language"):
        weights(torch.eye(2), "stch")
