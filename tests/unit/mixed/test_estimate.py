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
