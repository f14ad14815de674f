"""What rules are held against: weights a window late, and blocks that have nothing to do with the model."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds import aggregate
from bucketmoo_ds.plan import blocks


def register() -> None:
    """Makes the controls known by name; twice does no harm. Not done by importing this, so that nobody else's list of
    rules and granularities has them."""
    aggregate.register("late")(Late)
    blocks.granularity("random_blocks")(_random_block)


def _random_block(parameter: str, bucket: str) -> str:
    """Four blocks that have nothing to do with the model's structure: a control of `layer`."""
    return f"random {random.Random(parameter).randrange(4)}"


@dataclasses.dataclass(frozen=True)
class Late(aggregate.Aggregator):
    """The weights that a rule gives for the Grams of the window before; in the first window, averaging's."""

    rule: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, compare=False)

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`. A language that was not there in the window before counts as in averaging."""
        known = mask & self.before.get("mask", torch.zeros_like(mask))
        even = mask / mask.sum(-1, keepdim=True)
        found = even
        if bool(known.any()):
            both = known.unsqueeze(-1) & known.unsqueeze(-2)
            rule = aggregate.create(self.rule, **self.options)
            solved = rule.weights(torch.where(both, self.before["gram"], 0.0), known, generator)
            found = torch.where(known, solved * (known.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)), even)
        self.before.update(gram=gram.clone(), mask=mask.clone())
        return found
