"""Static weights: the languages weigh what they are told to, in every block and window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.errors import ConfigError, did_you_mean
from bucketmoo_ds.transfer import to_device


@register("static")
@dataclasses.dataclass(frozen=True)
class Static(Aggregator):
    """A weighted average of the rows: the control that every rule's weights are to be held against, once it is tuned.

    Weights are relative to each other: those of the languages present are divided by their sum, so that equal ones are
    averaging. Multiplying a language's loss by its weight does the same. Nothing is guaranteed by block; no cost.

    Args:
        shares: a positive number for each language, as `{"de": 2.0, "fr": 1.0}`, or in the order of `languages`.
    """

    cheap: ClassVar[bool] = True

    shares: Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        if isinstance(self.shares, str) or not isinstance(self.shares, Mapping | Sequence):
            raise _error(self.shares, 'expected a number for each language, such as {"de": 2.0, "fr": 1.0}')
        for share in self.shares.values() if isinstance(self.shares, Mapping) else self.shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share < math.inf:
                raise _error(share, "expected positive numbers; take a language that counts 0 out of the data")

    def at(self, languages: Sequence[str], present: Sequence[int], blocks: Sequence[int]) -> Static:
        """See `Aggregator.at`.

        Raises:
            ConfigError: a language without a share, or a share of no language.
        """
        shares = self.shares
        if isinstance(shares, Mapping):
            for name in shares:
                if name not in languages:
                    raise _error(name, f"no language of this run{did_you_mean(str(name), languages)}")
            missing = [name for name in languages if name not in shares]
            if missing:
                raise _error(dict(shares), f"has no {', '.join(missing)}; name every language (1.0 is a share)")
            return Static([shares[languages[index]] for index in present])
        if len(shares) != len(languages):
            raise _error(list(shares), f"{len(shares)} numbers for {len(languages)} languages")
        return Static([shares[index] for index in present])

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        if isinstance(self.shares, Mapping) or len(self.shares) != mask.shape[-1]:
            raise _error(self.shares, f"expected {mask.shape[-1]} numbers, one for each row")
        shares = mask * to_device(list(self.shares), torch.float64, gram.device)
        return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)


def _error(found: object, expected: str) -> ConfigError:
    return ConfigError(f'aggregator "static": shares: {found!r}: {expected}')
