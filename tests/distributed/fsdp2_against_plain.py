"""Worker: plain FSDP2 before and after bucketmoo_ds is imported, and gradients that must be its averages."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

WINDOWS = 2


def run(*, seed: int) -> dict[str, Any]:
    assert "bucketmoo_ds" not in sys.modules, "there would be nothing to compare"
    before = train_plain(seed)
    import bucketmoo_ds

    bucketmoo_ds.fsdp2  # noqa: B018 (the adapters are imported when they are asked for)
    return {
        "before_import": before,
        "after_import": train_plain(seed),
        "mean": difference(seed, languages=worker.WORLD_SIZE, aggregator="mean"),
        "one_language": difference(seed, languages=1, aggregator="mgda"),
    }


def sharded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = toy.ToyLM()
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def batches(seed: int, languages: int) -> list[dict[str, Tensor]]:
    """A batch of equally many tokens for every rank and window."""
    generator = torch.Generator().manual_seed(seed * 100 + worker.RANK)
    return [toy.micro_batch(worker.RANK % languages, generator) for _ in range(WINDOWS)]


def train_plain(seed: int) -> str:
    model = sharded(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in batches(seed, worker.WORLD_SIZE):
        model(**batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return worker.checksum(each.detach().to_local() for each in model.parameters())


def difference(seed: int, *, languages: int, aggregator: str) -> float:
    """The largest difference to plain FSDP2's gradient, in units of the mean size of the ranks' gradients."""
    import bucketmoo_ds

    plain, ours = sharded(seed), sharded(seed)
    twin = copy.deepcopy(toy.ToyLM())
    config = bucketmoo_ds.BucketMOOConfig(languages=[f"l{index}" for index in range(languages)], aggregator=aggregator)
    bucketmoo_ds.fsdp2.register(ours, config)
    worst = 0.0
    for batch in batches(seed, languages):
        twin.load_state_dict({name: value.full_tensor() for name, value in plain.state_dict().items()})
        twin.zero_grad()
        plain(**batch).backward()
        ours(**batch, language=worker.RANK % languages).backward()
        twin(**batch).backward()
        for expected, found, own in zip(plain.parameters(), ours.parameters(), twin.parameters(), strict=True):
            size = own.grad.abs()
            dist.all_reduce(size)
            off = (found.grad.full_tensor().double() - expected.grad.full_tensor().double()).abs()
            assert float(expected.grad.full_tensor().abs().max()) > 0
            worst = max(worst, float((off / (size / worker.WORLD_SIZE).clamp_min(1e-30)).max()))
        plain.zero_grad()
        ours.zero_grad()
    return worst


if __name__ == "__main__":
    worker.serve(run)
