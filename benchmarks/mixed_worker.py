"""The arms of the benchmark of mode `mixed`: one process or DDP, with it and without, on the same micro-batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import step_model
import torch
from step_worker import Arm, Run, Settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bucketmoo_ds as bm

PRELOADED = ["mixed_worker", "deepspeed", "torch._dynamo"]

SEQUENCES = 16  # of a micro-batch: two of each of eight languages
NEVER = 1 << 30  # windows from one Gram to the next: only the first one, which is not timed, takes it


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedArm(Arm):
    """Plain training (`aggregator` is `None`), or mode `mixed`.

    Args:
        grams: whether each timed window takes Grams, or none does.
    """

    grams: bool = False

    @property
    def name(self) -> str:
        """A name that no other arm has."""
        return "plain" if self.aggregator is None else f"K = {self.languages}, {'' if self.grams else 'no '}Grams"

    @property
    def config(self) -> bm.BucketMOOConfig:
        """See `Arm`."""
        return dataclasses.replace(super().config, granularity="layer", gram_every=1 if self.grams else NEVER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedSettings(Settings):
    """What all arms of a process set share; with one process there is no wrapper, with several DDP."""

    def run(self, arm: Arm, rank: int) -> MixedRun:
        """See `Settings`."""
        return MixedRun(self, arm, rank)


class MixedRun(Run):
    """A model of one arm."""

    def __init__(self, settings: MixedSettings, arm: Arm, rank: int) -> None:
        super().__init__(settings, arm, rank)
        self.moo = None
        self.model: Any = Modular(self.model)
        if arm.aggregator is not None:
            bm.mixed.register(self.model, arm.config)
        if settings.world_size > 1:
            self.model = DistributedDataParallel(self.model, bucket_cap_mb=settings.bucket_elements * 4 / 2**20)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for batch in self.batches:
            for name in ("input_ids", "labels"):
                batch[name] = batch[name].view(SEQUENCES, -1)
            if arm.aggregator is not None:
                batch["language"] = torch.arange(SEQUENCES) % arm.languages

    def window(self) -> None:
        """See `Run`."""
        for batch in self.batches:
            self.model(**batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Modular(nn.Module):
    """The model of the step benchmarks in float32, with every parameter used by its own module."""

    def __init__(self, model: step_model.CausalLM) -> None:
        super().__init__()
        self.inner = model
        for module in model.modules():
            for cls, plain in ((step_model.Linear, nn.Linear), (step_model.LayerNorm, nn.LayerNorm)):
                if type(module) is cls:
                    module.__class__ = plain  # which compute in the parameters' dtype
        self.head = nn.Linear(step_model.WIDTH, step_model.VOCABULARY, bias=False)
        self.head.weight = model.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss per target token."""
        hidden = self.inner.embed(input_ids) + self.inner.position(torch.arange(input_ids.shape[1]))
        for layer in self.inner.layers:
            hidden = layer(hidden)
        logits = self.head(self.inner.norm(hidden))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
