"""Smooth Tchebycheff scalarization: the weights follow from the losses alone, whatever the gradients are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, check_number, register
from bucketmoo_ds.config import MAX_LANGUAGES, by_language, positive_numbers
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.transfer import to_device

REFERENCE = 'aggregator "stch": z'


@register("stch")
@dataclasses.dataclass(frozen=True)
class STCH(Aggregator):
    """The gradient of `mu log sum_i exp(p_i (f_i - z_i) / mu)` (Lin, Zhang, Yang, Liu, Wang & Zhang, ICML 2024), where
    f_i is a language's mean loss per target token in the window and p_i its preference.

    So `w = softmax(p (f - z) / mu)`, times the preference: for a large mu averaging, and the smaller it is, the more
    the language of the largest loss decides. A control: it costs nothing and sees no conflict, so what a rule on Grams
    gains should be held against it. All blocks get the same weights, and nothing is guaranteed by block. The scale of
    losses counts, as no Gram's does: nats per token are not alike where a tokenizer serves languages unequally, which z
    can make good. (The authors' code for multi-task learning takes the logarithm of losses over those of a warm-up;
    here, as in their paper, f is the loss.)

    Args:
        mu: the smoothing, in units of a loss, above 0.
        z: the reference point, what each loss is measured from, such as that of a model of the language alone: a number
            for all, or one for each language, by name or in the order of `languages`.
    """

    streams_up_to: ClassVar[int] = MAX_LANGUAGES
    uses_losses: ClassVar[bool] = True

    mu: float = 1.0
    z: float | Mapping[str, float] | Sequence[float] = 0.0
    _exponents: Tensor | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("stch", "mu", self.mu, 1e-6, 1e6)
        if isinstance(self.z, int | float):
            check_number("stch", "z", self.z, 0.0, 1e6)
        else:
            positive_numbers(REFERENCE, self.z)

    def at(self, languages: Sequence[str], present: Sequence[int], blocks: Sequence[int]) -> STCH:
        """See `Aggregator.at`.

        Raises:
            ConfigError: a language without a z, or a z of no language.
        """
        if isinstance(self.z, int | float):
            return self
        z = by_language(REFERENCE, self.z, languages)
        return STCH(self.mu, [z[index] for index in present])

    def with_losses(self, losses: Tensor, preference: Tensor) -> STCH:
        """See `Aggregator.with_losses`."""
        here, count = copy.copy(self), losses.shape[-1]
        z = [self.z] * count if isinstance(self.z, int | float) else self.z
        if isinstance(z, Mapping) or len(z) != count:
            raise ConfigError(f"{REFERENCE} = {self.z!r}: expected {count} numbers, one for each row")
        away = losses - to_device(z, torch.float64, losses.device)
        object.__setattr__(here, "_exponents", preference * away / self.mu)
        return here

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        assert self._exponents is not None
        shown = torch.where(mask, self._exponents, -torch.inf)
        return torch.where(mask.any(-1, keepdim=True), shown.softmax(-1), 0.0)
