"""Random weights: what any rule has to beat, for noise in the weights alone can change a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, check_number, register
from bucketmoo_ds.config import MAX_LANGUAGES
from bucketmoo_ds.transfer import to_device


@register("random")
@dataclasses.dataclass(frozen=True)
class Random(Aggregator):
    """The softmax of normal numbers (Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022), drawn anew
    for every block and window.

    A block's numbers depend on its number and the generator, not on which blocks are solved beside it or by which rank.
    What is drawn is for K rows: a language masked out takes its number along, so that masking one equals deleting it in
    distribution only. The mean over many windows is averaging. Nothing is guaranteed by block; no cost.

    Args:
        spread: standard deviation of the normal numbers, from 0 (averaging) to below 100. 1 is the paper's. As a
        control
            of another rule, take the one that gives the same spread of weights.
    """

    streams_up_to: ClassVar[int] = MAX_LANGUAGES

    spread: float = 1.0
    _blocks: tuple[int, ...] | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("random", "spread", self.spread, 0.0, 100.0)

    def at(self, languages: Sequence[str], present: Sequence[int], blocks: Sequence[int]) -> Random:
        """See `Aggregator.at`."""
        here = Random(self.spread)
        object.__setattr__(here, "_blocks", tuple(blocks))
        return here

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        blocks = range(len(gram)) if self._blocks is None else self._blocks
        # Uniform numbers come one after the other: a block's are the same however many follow.
        drawn = torch.rand(
            max(blocks, default=-1) + 1, mask.shape[-1], dtype=torch.float64, generator=generator,
            device=generator.device,
        )[list(blocks)]  # fmt: skip
        normal = math.sqrt(2.0) * torch.erfinv((2.0 * drawn - 1.0).clamp(min=-1.0 + 2.0**-53))
        logits = to_device(self.spread * normal, torch.float64, gram.device)
        return torch.where(mask, logits, -torch.inf).softmax(-1)
