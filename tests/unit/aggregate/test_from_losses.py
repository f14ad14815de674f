"""Rules whose weights follow from losses, against autograd of what they are the gradient of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds.aggregate import create, weights
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
