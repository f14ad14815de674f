"""The window of the mixed mode: how many target tokens each language feeds to it, and what a token counts.

A row is the gradient of a language's mean loss per target token over the window; so N_l, its tokens on all ranks in all
micro-steps, divides each of them. N_l is known before the first backward where the window has one micro-step, and where
the micro-batches were told (`expect`). Elsewhere it is *expected*: M times the language's mean of micro-steps so far,
and what weights were used in truth is known at the window's end: each language's times N_l over what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.errors import DisagreementError

KEPT = 0.99  # of the running mean of tokens, from micro-step to micro-step


class MixedWindow:
    """The tokens of the current window, equal on all ranks.

    Args:
        num_languages: K.
        weighting: `language` or `token`, see `BucketMOOConfig`.

    Attributes:
        micro_steps: how many have come since the last step.
        begins: whether the latest one is the first of M, or of those that were told; more may come before a step.
        target_tokens: of every language so far, on all ranks, `[K]`.
        present: the languages that the window's weights are for, ascending.
    """

    def __init__(self, num_languages: int, weighting: str) -> None:
        self._count = num_languages
        self._weighting = weighting
        self._mean = [0.0] * num_languages  # tokens in a micro-step, with the same weights as `_mean_of_one`
        self._mean_of_one = 0.0
        self._told: tuple[list[int], int] | None = None
        self.clear()

    def clear(self) -> None:
        """Starts the next window."""
        self.micro_steps = self._left = 0
        self.begins = False
        self.target_tokens = [0] * self._count
        self._since = [0] * self._count  # tokens since it began
        self.present: list[int] = []
        self._divisors: list[float] = []

    def expect(self, target_tokens: Sequence[int], micro_steps: int) -> None:
        """Is told this rank's tokens of the whole window that comes, `[K]`, and how many micro-steps it has."""
        self._told = list(target_tokens), micro_steps

    def to_numbers(self, target_tokens: Sequence[int]) -> list[int]:
        """Returns what this rank has to say about a micro-step: how many a window that was told has, 0 if it was not,
        its tokens, and those of the micro-step."""
        tokens, steps = self._told or ([0] * self._count, 0)
        return [steps, *tokens, *target_tokens]

    def add(self, told: Sequence[Sequence[int]], micro_steps: int) -> None:
        """Appends a micro-step.

        Args:
            told: `to_numbers` of every rank.
            micro_steps: M.

        Raises:
            DisagreementError: ranks were told different numbers of micro-steps.
        """
        if len({row[0] for row in told}) > 1:
            steps = ", ".join(f"rank {rank}: {row[0]}" for rank, row in enumerate(told))
            raise DisagreementError(
                f"session.expect was told different numbers of micro-batches ({steps}): call it on all ranks, or on "
                "none, with as many on each"
            )
        columns = list(zip(*told, strict=True))
        window = [sum(each) for each in columns[1 : self._count + 1]]
        step = [sum(each) for each in columns[self._count + 1 :]]
        self._mean = [KEPT * old + (1 - KEPT) * new for old, new in zip(self._mean, step, strict=True)]
        self._mean_of_one = KEPT * self._mean_of_one + (1 - KEPT)
        self.begins = self._left == 0 or told[0][0] > 0
        if self.begins:
            self._since = [0] * self._count
            self._left = told[0][0] or micro_steps
            if told[0][0]:
                self._divisors = [float(tokens) for tokens in window]
            elif micro_steps == 1:
                self._divisors = [float(tokens) for tokens in step]
            else:
                self._divisors = [micro_steps * mean / self._mean_of_one for mean in self._mean]
            self._told = None
            self.present = [language for language, tokens in enumerate(self._divisors) if tokens > 0]
        for language, tokens in enumerate(step):
            if tokens and not self._divisors[language]:  # it comes for the first time, in mid-window
                self._divisors[language] = micro_steps * self._mean[language] / self._mean_of_one
                self.present = sorted([*self.present, language])
        self.target_tokens, self._since = (
            [old + new for old, new in zip(tokens, step, strict=True)] for tokens in (self.target_tokens, self._since)
        )
        self.micro_steps += 1
        self._left -= 1

    @property
    def fed(self) -> list[int]:
        """The languages that fed a token to this window."""
        return [language for language, tokens in enumerate(self.target_tokens) if tokens]

    def shares(self) -> list[float]:
        """Returns what the sum of each language's token losses is multiplied by to be its row, `[K]`."""
        return self._shares(self._divisors)

    def units(self) -> list[float]:
        """Returns the length of each language's row in units of its mean per token, `[K]`."""
        return [share * tokens for share, tokens in zip(self.shares(), self._divisors, strict=True)]

    def used(self, weights: Tensor) -> Tensor:
        """Returns the weights `[B, K]` that the window's rows got in truth."""
        pairs = zip(self.shares(), self._shares([float(each) for each in self._since]), strict=True)
        ratios = [share / true if true else 0.0 for share, true in pairs]
        return weights * torch.tensor(ratios, dtype=weights.dtype)

    def _shares(self, tokens: Sequence[float]) -> list[float]:
        if self._weighting == "token":
            each = sum(1 for count in tokens if count) / max(sum(tokens), 1.0)
            return [each if count else 0.0 for count in tokens]
        return [1.0 / count if count else 0.0 for count in tokens]

    def state_dict(self) -> dict[str, Any]:
        """Returns the mean of tokens, as plain JSON values."""
        return {"mean_tokens": [*self._mean, self._mean_of_one]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        *self._mean, self._mean_of_one = state["mean_tokens"]
