"""Weights that are used for several windows: solved in one, with its Grams, and taken over by `gram_every` - 1 more.

Between, no Gram is taken or exchanged. What is known of a language is its weight in units of what averaging gives it
(its `preference` counted) among those that took part when it was solved, so that it means the same beside others; one
that comes in between is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError


class Reuse:
    """The latest solved weights, on the host, alike on all ranks.

    Args:
        config: the settings.
        every: R, the windows from one solve to the next.

    Attributes:
        every: the argument.
    """

    def __init__(self, config: BucketMOOConfig, every: int) -> None:
        self._languages = list(config.languages)
        self._preference = torch.tensor(config.preference, dtype=torch.float64)
        self.every = every
        self._used = 0  # windows that have used them
        self._known: Tensor | None = None  # [B, K] bool, of what they were solved
        self._gram = self._shares = torch.empty(0, dtype=torch.float64)

    @property
    def due(self) -> bool:
        """Whether the next window is to be solved."""
        return self._known is None or self._used >= self.every

    def take(self, gram: Tensor, weights: Tensor, mask: Tensor) -> None:
        """Takes what a window has solved, `[B, K, K]` and `[B, K]`, and which languages took part, `[B, K]` bool."""
        if self.every > 1:
            self._gram, self._shares, self._known = gram, weights / self._even(mask), mask
            self._used = 1

    def use(self) -> None:
        """A window has used them that has not solved anything."""
        self._used += 1

    def decided(self, mask: Tensor, present: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the Grams `[B, K, K]` that weights come from, of the languages present, and the weights `[B, K]` of
        those that take part in a window that has not solved anything, `[B, K]` bool."""
        assert self._known is not None
        shares = torch.where(mask, torch.where(self._known, self._shares, 1.0), 0.0)
        here = torch.zeros(len(self._languages), dtype=torch.bool)
        here[list(present)] = True
        return torch.where(here & here.unsqueeze(1), self._gram, 0.0), shares * self._even(mask)

    def _even(self, mask: Tensor) -> Tensor:
        """Returns what averaging gives to each language of a block, by preference, `[B, K]`."""
        return self._preference / (mask * self._preference).sum(-1, keepdim=True).clamp(min=self._preference.min())

    def state_dict(self) -> dict[str, Any]:
        """Returns them as plain JSON values, under the name "weights"; nothing where each window is solved."""
        if self._known is None:
            return {}
        kept = {"gram": self._gram.tolist(), "shares": self._shares.tolist(), "known": self._known.tolist()}
        return {"weights": {"languages": self._languages, "used": self._used, **kept}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; without any there, the next window is solved.

        Raises:
            ConfigError: they are of other languages.
        """
        self._known, saved = None, state.get("weights")
        if saved is None or self.every == 1:
            return
        if saved["languages"] != self._languages:
            raise ConfigError(
                f"the checkpoint has {SECTION}.languages = {saved['languages']}, here {self._languages}: weights that "
                "are in use need the same languages in the same order"
            )
        self._known, self._used = torch.tensor(saved["known"]), int(saved["used"])
        self._gram, self._shares = (torch.tensor(saved[name], dtype=torch.float64) for name in ("gram", "shares"))
