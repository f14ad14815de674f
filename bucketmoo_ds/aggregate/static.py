"""Static weights: the languages weigh what they are told to, in every block and window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.config import MAX_LANGUAGES, by_language, positive_numbers
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.transfer import to_device

SHARES = 'aggregator "static": shares'


@register("static")
@dataclasses.dataclass(frozen=True)
class Static(Aggregator):
    """A weighted average of the rows: the control that every rule's weights are to be held against, once it is tuned.

    Weights are relative to each other: those of the languages present are divided by their sum, so that equal ones are
    averaging. Multiplying a language's loss by its weight does the same. Nothing is guaranteed by block; no cost.

    Args:
        shares: a positive number for each language, as `{"de": 2.0, "fr": 1.0}`, or in the order of `languages`.
    """

    streams_up_to: ClassVar[int] = MAX_LANGUAGES

    shares: Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        positive_numbers(SHARES, self.shares)

    def at(self, languages: Sequence[str], present: Sequence[int], blocks: Sequence[int]) -> Static:
        """See `Aggregator.at`.

        Raises:
            ConfigError: a language without a share, or a share of no language.
        """
        shares = by_language(SHARES, self.shares, languages)
        return Static([shares[index] for index in present])

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        if isinstance(self.shares, Mapping) or len(self.shares) != mask.shape[-1]:
            raise ConfigError(f"{SHARES} = {self.shares!r}: expected {mask.shape[-1]} numbers, one for each row")
        shares = mask * to_device(list(self.shares), torch.float64, gram.device)
        return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)

