"""The pipeline on a CUDA device whose queue is full: its own stream waits for gradients, and the caller's for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none"),
]

NUMEL, BUCKETS, LANGUAGES = 1 << 20, 8, 3
LATE = 200_000_000  # cycles: about a tenth of a second


@pytest.mark.parametrize("mode", ["auto", "deferred"])
@pytest.mark.parametrize("storage", ["float32", "host"])
def test_combined_gradients_are_those_of_the_cpu(mode: str, storage: str) -> None:
    """Gradients are written late, by kernels that the host has only queued; their memory is handed out again at once.
    Both sides add up float32 rows with three float32 weights: a few roundings of 2^-24 of the rows, which are below 5.
    """
    seed = torch.seed()
    print(f"seed {seed}")
    found, expected = (_windows(device, mode, storage, seed) for device in ("cuda", "cpu"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=8 * 2.0**-24 * 5)


def _windows(device: str, mode: str, storage: str, seed: int) -> list[Tensor]:
    config = BucketMOOConfig(languages=["de", "fr", "pl"], aggregator="mean", mode=mode, row_storage=storage)
    plan = plan_blocks([Parameter(f"p{index}", NUMEL) for index in range(BUCKETS)], NUMEL, "bucket")
    combined: dict[int, Tensor] = {}
    moo = BucketMOO(
        config,
        plan,
        Exchange(),
        combined.__setitem__,
        micro_steps=lambda: LANGUAGES,
        once_a_window=False,
        device=device,
    )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        for language in range(LANGUAGES):
            moo.begin_micro_step(Slot(language, 4, 1.0), language == LANGUAGES - 1)
            for bucket in range(BUCKETS):
                source = torch.randn(NUMEL, generator=generator).clamp(-5, 5).to(device)
                gradient = torch.zeros_like(source)
                if device == "cuda" and bucket % 3 == 0:
                    torch.cuda._sleep(LATE)
                gradient.copy_(source)
                moo.ingest(bucket, gradient)
                del gradient
                torch.full((NUMEL,), float("nan"), device=device)  # may lie where the gradient lay
            moo.end_micro_step([True] * BUCKETS)
        moo.finish()
        found += [combined[bucket].clone().cpu() for bucket in range(BUCKETS)]
        combined.clear()
    return found
