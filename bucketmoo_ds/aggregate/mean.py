"""Plain averaging: what training without conflict resolution does, and the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.config import MAX_LANGUAGES


@register("mean")
@dataclasses.dataclass(frozen=True)
class Mean(Aggregator):
    """Gives each of the n unmasked languages of a block the weight 1/n."""

    streams_up_to: ClassVar[int] = MAX_LANGUAGES

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        return uniform(mask)


def uniform(mask: Tensor) -> Tensor:
    """Returns `[B, K]` float64 weights equal over the languages of the mask, which sum to 1 (to 0 over none)."""
    on = mask.to(torch.float64)
    return on / on.sum(-1, keepdim=True).clamp(min=1.0)
