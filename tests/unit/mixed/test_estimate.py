"""The running estimate of Grams."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import bucketmoo_ds as bm
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.pipeline.estimate import GramEstimate

SEED = random.SystemRandom().randrange(2**32)
LANGUAGES = ("de", "fr", "ko")


def test_windows_count_alike_whatever_their_size() -> None:
    """A window whose gradients were a thousand times as long says as much about directions as a later one."""
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    sizes = 10 ** (3 * torch.rand(5, 2, 1, generator=generator, dtype=torch.float64))
    rows = torch.randn(5, 2, 6, 9, generator=generator, dtype=torch.float64)
    rows /= rows.unflatten(2, (3, 2)).sum(3).flatten(2).norm(dim=2)[..., None, None]  # one size

    def estimated(grams: Tensor) -> Tensor:
        config = bm.BucketMOOConfig(languages=LANGUAGES, smoothing=0.8)
        estimate = GramEstimate(config, 2, Exchange(), "reference", torch.device("cpu"))
        for each in grams:
            estimate.add(each, 1.0, torch.ones(1, 6))
            estimate.finish([2, 2, 2])
        return estimate.gram()[0]

    alike = rows @ rows.mT
    found, wanted = estimated(alike * sizes.unsqueeze(-1)), estimated(alike) * sizes[-1].unsqueeze(-1)
    # Five products of float64 each way.
    assert (found - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def test_rules_see_the_length_that_rows_are_expected_to_have() -> None:
    """docs/theory.md, section 9: off the diagonal the products, on it those of the halves and the share of the noise
    that is left in a mean over the window; and the nearest positive semidefinite matrix to that."""
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(3, 2, 6, 9, generator=generator, dtype=torch.float64)  # micro-batches, blocks, groups
    tokens = torch.randint(1, 9, (3, 1, 6), generator=generator).double()
    scales = [1.0, 2.5, 0.5]
    config = bm.BucketMOOConfig(languages=LANGUAGES, smoothing=0.0)
    estimate = GramEstimate(config, 2, Exchange(), "reference", torch.device("cpu"))
    for each, scale, count in zip(rows, scales, tokens, strict=True):
        estimate.add(each @ each.mT, scale, count)
    window = tokens.sum((0, 1)).view(3, 2).sum(1)
    estimate.finish(window.int().tolist())

    squares = torch.tensor(scales, dtype=torch.float64).square().view(3, 1, 1, 1)
    whole, n = rows.unflatten(2, (3, 2)).sum(3), tokens.view(3, 3, 2).sum(2)
    expected = (squares * (whole @ whole.mT)).sum(0) / (n.unsqueeze(2) * n.unsqueeze(1)).sum(0)
    first, second = rows[:, :, ::2], rows[:, :, 1::2]
    crossed = (tokens[:, 0, ::2] * tokens[:, 0, 1::2]).sum(0)
    signal = ((squares[..., 0] * (first * second).sum(-1)).sum(0) / crossed).clamp(min=0.0)
    left = n.square().sum(0) / window.square()
    diagonal = left * expected.diagonal(dim1=1, dim2=2) + (1.0 - left) * signal
    expected.diagonal(dim1=1, dim2=2).copy_(diagonal)
    values, vectors = torch.linalg.eigh(expected)
    expected = vectors @ torch.diag_embed(values.clamp(min=0.0)) @ vectors.mT
    found, known = estimate.gram()
    assert known.all()
    # Sums of a hundred float64 products, and an eigenvalue problem.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
