"""`preference` and `normalize`: what rows are multiplied by before any rule sees them."""

from __future__ import annotations

import pytest
import torch
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.aggregate.grams import RULES, combined_error, gram_of, make_rows, rows

from bucketmoo_ds.aggregate import weights
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.plan.choices import create_aggregator

SAME = 1e-6  # as in test_properties.py: two solves of one problem
numbers = st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6)
two_kinds = rows(kinds=("random", "common direction"))


@settings(deadline=None, max_examples=examples(12))
@given(two_kinds, st.sampled_from(RULES), numbers, st.integers(0, 2**32 - 1))
def test_preference_is_the_rule_on_scaled_rows(rows: Tensor, rule: str, told: list[float], seed: int) -> None:
    preference = torch.tensor(told[: rows.shape[1]], dtype=torch.float64)
    scale = preference / preference.mean()
    scaled = rows * scale.unsqueeze(-1)
    found = weights(gram_of(rows), rule, preference=preference, seed=seed)
    assert combined_error(rows, found, weights(gram_of(scaled), rule, seed=seed) * scale) <= SAME
    # Only its proportions count; equal ones are none, to the bit.
    assert combined_error(rows, found, weights(gram_of(rows), rule, preference=7.0 * preference, seed=seed)) <= SAME
    even = torch.ones_like(preference)
    assert torch.equal(
        weights(gram_of(rows), rule, preference=even, seed=seed), weights(gram_of(rows), rule, seed=seed)
    )


@settings(deadline=None, max_examples=examples(6))
@given(rows(least=3), numbers, st.sampled_from(("none", "mean")))
def test_the_mean_becomes_the_weighted_mean_of_those_present(rows: Tensor, told: list[float], rescale: str) -> None:
    preference = torch.tensor(told[: rows.shape[1]], dtype=torch.float64)
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    mask[0, 0], mask[1, 1:], mask[2] = False, False, False
    found = weights(gram_of(rows), "mean", mask, preference=preference, rescale=rescale)
    shares = mask * preference
    expected = shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)
    # Rescaled to the norm that it has, which is that of a sum that may have cancelled to 1e-4 of its parts.
    torch.testing.assert_close(found, expected, rtol=1e-7 if rescale == "mean" else 1e-14, atol=0)
    broken = gram_of(rows) * float("nan")
    torch.testing.assert_close(weights(broken, "mgda", mask, preference=preference), expected, rtol=1e-14, atol=0)


@settings(deadline=None, max_examples=examples(12))
@given(two_kinds, st.sampled_from(RULES), numbers, st.sampled_from(("loss", "loss_l2")))
def test_normalize_by_losses_is_the_rule_on_rows_divided_by_them(
    rows: Tensor, rule: str, told: list[float], normalize: str
) -> None:
    losses = torch.tensor(told[: rows.shape[1]], dtype=torch.float64)
    size = losses * rows.norm(dim=-1) if normalize == "loss_l2" else losses.expand(rows.shape[:2])
    scale = size.median(-1, keepdim=True).values / size  # of two middle ones the lower
    found = weights(gram_of(rows), rule, normalize=normalize, losses=losses)
    expected = weights(gram_of(rows * scale.unsqueeze(-1)), rule) * scale
    assert combined_error(rows, found, expected) <= SAME
    # Equal losses are none; and a loss in other units is the same.
    plain = weights(gram_of(rows), rule, normalize="l2" if normalize == "loss_l2" else "none")
    even = torch.full_like(losses, told[0])
    assert combined_error(rows, plain, weights(gram_of(rows), rule, normalize=normalize, losses=even)) <= SAME
    again = weights(gram_of(rows), rule, normalize=normalize, losses=1e3 * losses)
    assert combined_error(rows, found, again) <= SAME


def test_preference_counts_beside_normalize() -> None:
    """Else it would be normalised away."""
    gram = gram_of(make_rows("random", 4, 3, torch.Generator().manual_seed(torch.seed() % 2**32)))
    told = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    both = weights(gram, "mean", normalize="l2", preference=told)
    plain = weights(gram, "mean", normalize="l2")
    torch.testing.assert_close(both, plain * told / 2.0, rtol=1e-14, atol=0)


def test_losses_of_masked_languages_count_for_nothing_and_bad_ones_average() -> None:
    gram = gram_of(make_rows("random", 2, 3, torch.Generator().manual_seed(torch.seed() % 2**32)))
    mask = torch.tensor([[True, True, False]] * 2)
    found = [
        weights(gram, "upgrad", mask, normalize="loss", losses=[2.0, 3.0, last]) for last in (5.0, float("nan"), 0.0)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    unknown = weights(gram, "upgrad", mask, normalize="loss", losses=[2.0, float("nan"), 1.0])
    assert unknown.tolist() == [[0.5, 0.5, 0.0]] * 2
    # A loss of 0 says nothing of its row, which stays as it is.
    zero = weights(gram, "mean", normalize="loss", losses=[0.0, 2.0, 4.0])
    torch.testing.assert_close(zero[0], torch.tensor([1 / 3, 1 / 3, 1 / 6], dtype=torch.float64))


def test_preference_is_put_in_the_order_of_the_languages() -> None:
    config = BucketMOOConfig(languages=["de", "fr"], preference={"fr": 2, "de": 0.5})
    assert config.preference == (0.5, 2)
    assert config.to_json()["preference"] == [0.5, 2]
    assert BucketMOOConfig.from_section(config.to_json()) == config
    assert BucketMOOConfig(languages=["de", "fr"], preference=[1.0, 1.0]) == BucketMOOConfig(languages=["de", "fr"])


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ({"de": 1.0, "frr": 1.0}, 'frr.: no language of this run; did you mean "fr"'),
        ({"de": 1.0}, "has no fr; name every language"),
        ([1.0, 0.0], "0.0: expected positive numbers"),
        ("de", "expected a number for each language"),
    ],
)
def test_a_bad_preference_is_refused(preference: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"bucket_moo.preference = .*{message}"):
        BucketMOOConfig(languages=["de", "fr"], preference=preference)


def test_static_has_shares_of_its_own() -> None:
    config = BucketMOOConfig(
        languages=["de", "fr"], aggregator="static", aggregator_options={"shares": [1, 2]}, preference=[1, 2]
    )
    with pytest.raises(ConfigError, match=r"bucket_moo\.preference: means what the shares"):
        create_aggregator(config)
