"""Worker: counts what one window sends, with plain DeepSpeed and with bucket_moo, one after the other."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
import torch.distributed as dist
import worker
from torch import Tensor, nn

import bucketmoo_ds
from benchmarks import traffic


def run(*, seed: int, **case: Any) -> dict[str, Any]:
    """Trains the same model both ways. The arguments of a case are those of `train`."""
    return {
        name: train(seed=seed, languages=languages, **case)
        for name, languages in (("plain", None), ("moo", worker.WORLD_SIZE))
    }


def train(
    *, seed: int, stage: int, micro_steps: int, dtype: str, accumulate: str | None, languages: int | None
) -> dict[str, Any]:
    """Trains four windows and counts the last, when nothing is done for the first time any more: by then ZeRO-3 has
    noted the order of the modules, and compared it across ranks.

    Args:
        accumulate: DeepSpeed's `grad_accum_dtype`.
        languages: K, or `None` for plain DeepSpeed.
    """
    torch.manual_seed(seed)
    model = make_model(seed)
    numel = sum(parameter.numel() for parameter in model.parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 25_000,
            "stage3_param_persistence_threshold": 1000,
        },
        "steps_per_print": 10**9,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if accumulate:
        config["data_types"] = {"grad_accum_dtype": accumulate}
    if languages:
        config["bucket_moo"] = {"languages": [f"l{index}" for index in range(languages)]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine, *_ = bucketmoo_ds.initialize(model=model, optimizer=optimizer, config=config)
    moo = engine.moo if languages else None
    for _ in range(3):
        window(engine)
    own = dict(moo.exchange.sent_bytes) if moo else {}
    dist.barrier()
    before = traffic.socket_bytes()
    with traffic.record() as calls:
        window(engine)
    dist.barrier()  # every rank has read what was sent to it, so it has been sent
    sockets = traffic.socket_bytes() - before
    found: dict[str, Any] = {
        "numel": numel,
        "sent": traffic.sent_by(calls, "purpose"),
        "gradients": traffic.gradient_bytes(calls),
        "rows_calls": [call.elements for call in calls if call.purpose == "rows"],
        "counted": sum(call.sent_bytes for call in calls),
        "calls": len(calls),
        "sockets": sockets,
    }
    if moo:
        found |= {
            "own": {name: sent - own[name] for name, sent in moo.exchange.sent_bytes.items()},
            "carried": traffic.exchange_counters(calls),
            "streaming": moo.streaming,
            "buckets": [bucket.numel for bucket in moo.plan.buckets],
            "parameters": [parameter.numel for parameter in moo.plan.parameters],
        }
    if moo and stage < 3:
        shards = [moo.exchange.shard_numel(bucket.numel) for bucket in moo.plan.buckets]
        found |= {
            "held": [
                int(moo.plan.segments(bucket, worker.RANK * size, (worker.RANK + 1) * size).spans[:, 1].sum())
                for bucket, size in enumerate(shards)
            ],
        }
    return found


def make_model(seed: int) -> nn.Module:
    """About 100,000 parameters in layers of random, odd sizes, so that nothing is divisible by the number of ranks."""
    draw = random.Random(seed)
    widths = [draw.randrange(81, 160, 2) for _ in range(7)]
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return _WithLoss(nn.Sequential(*layers), widths[0])


class _WithLoss(nn.Module):
    def __init__(self, layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers, self.width = layers, width

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.to(next(self.parameters()).dtype)
        return self.layers(hidden).float().square().mean()


def window(engine: Any) -> None:
    """Rank r trains on language r in every micro-step, as ZeRO-1 needs it."""
    for _ in range(engine.gradient_accumulation_steps()):
        inputs = torch.randn(2, engine.module.width)
        extra = {"language": worker.RANK} if hasattr(engine, "moo") else {}
        engine.backward(engine(inputs, **extra))
        engine.step()


if __name__ == "__main__":
    traffic.install()
    worker.serve(run)
