"""The window: which language every (micro-step, rank) slot trained on, and what a row's mean over it is.

A *row* is the gradient of the mean loss per target token of one language over the whole window. With `n_b` target
tokens in micro-batch b, `g_b` its gradient as the framework hands it over (the mean loss, divided by the M micro-steps
of a window) and `N_l` the target tokens of language l in the window,

    row_l = sum over b in l of (n_b / N_l) M g_b.

So `mean` over the rows equals plain averaging, to rounding, when all languages fed equally many tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bucketmoo_ds.data.batch import Slot


class Window:
    """The table (micro-step, rank) -> slot of the current window, equal on all ranks.

    Args:
        num_languages: K.
        weighting: `language` or `token`, see `BucketMOOConfig`.
        local: whether each rank adds up its micro-steps before they are exchanged at the boundary (ZeRO-1).
        apart: whether it keeps the sums of its languages apart, and exchanges one after the other; else it must keep
            one language for the window.
    """

    def __init__(self, num_languages: int, weighting: str, local: bool, apart: bool = False) -> None:
        self.num_languages = num_languages
        self.weighting = weighting
        self.local = local
        self.apart = apart
        self.table: list[list[Slot]] = []

    def clear(self) -> None:
        """Starts the next window."""
        self.table = []

    def add(self, slots: Sequence[Slot]) -> None:
        """Appends a micro-step: the slots of all ranks."""
        self.table.append(list(slots))

    def changed_language(self, slots: Sequence[Slot]) -> int | None:
        """Returns the first rank whose language differs from its earlier micro-steps where that is not allowed."""
        if not self.local or self.apart or not self.table:
            return None
        pairs = enumerate(zip(self.table[0], slots, strict=True))
        return next((rank for rank, (first, now) in pairs if first.language != now.language), None)

    @property
    def present(self) -> list[int]:
        """The languages that fed at least one target token to this window, ascending."""
        return [language for language, tokens in enumerate(self.target_tokens) if tokens > 0]

    @property
    def target_tokens(self) -> list[int]:
        """The target tokens of every language in this window."""
        tokens = [0] * self.num_languages
        for slots in self.table:
            for slot in slots:
                tokens[slot.language] += slot.target_tokens
        return tokens

    @property
    def parts(self) -> int:
        """How many exchanges carry what the ranks hold now: where they have added up several languages, as many as the
        rank with the most of them."""
        if not self.local:
            return 1
        return max(1, *(len(self.languages_of(rank)) for rank in range(len(self.table[0]))))

    def languages_of(self, rank: int) -> list[int]:
        """Returns the languages that a rank has fed to this window, in the order in which they came."""
        return list(dict.fromkeys(slot.language for slot in self._slots_of(rank) if slot.target_tokens > 0))

    def local_factor(self, rank: int) -> float:
        """Returns by what a rank's latest gradient is multiplied where it adds up micro-steps itself; 1 for its first
        gradient of the language, whose scale then holds for the sum."""
        latest = self.table[-1][rank]
        fed = (slot for slot in self._slots_of(rank) if slot.target_tokens > 0 and slot.language == latest.language)
        first = next(fed, latest)
        return latest.scale / first.scale if first.scale else 0.0

    def sources(self, part: int = 0) -> list[Slot]:
        """Returns, rank by rank, the slot that stands for what the rank exchanges in this part."""
        if not self.local:
            return self.table[-1]
        return [self._source(rank, part) for rank in range(len(self.table[0]))]

    def _source(self, rank: int, part: int) -> Slot:
        languages = self.languages_of(rank)
        if part >= len(languages):
            return Slot(self.table[-1][rank].language, 0, 0.0)
        return next(
            slot for slot in self._slots_of(rank) if slot.target_tokens > 0 and slot.language == languages[part]
        )

    def _slots_of(self, rank: int) -> list[Slot]:
        return [slots[rank] for slots in self.table]

    def reference_scale(self, language: int) -> float:
        """Returns the scale of the language's first slot. Rows are kept in its units, so that equal micro-batches are
        added without a single rounding beyond the sum's own."""
        slots = (slot for step in self.table for slot in step)
        return next(slot.scale for slot in slots if slot.language == language and slot.target_tokens > 0)

    def coefficients(self) -> list[float]:
        """Returns, for each language present, what its stored row has to be multiplied by (see the module)."""
        tokens = self.target_tokens
        present = self.present
        total = sum(tokens)
        share = {
            "language": lambda language: 1.0 / tokens[language],
            "token": lambda language: len(present) / total,
        }[self.weighting]
        return [self.reference_scale(language) * share(language) for language in present]


def merged_by_node(slots: Sequence[Slot], ranks_per_node: int) -> list[Slot] | None:
    """Returns one slot for each node, which stands for the sum of its ranks' gradients in units of that slot's scale;
    `None` where the ranks of a node train on several languages."""
    merged = []
    for first in range(0, len(slots), ranks_per_node):
        fed = [slot for slot in slots[first : first + ranks_per_node] if slot.target_tokens > 0]
        if len({slot.language for slot in fed}) > 1:
            return None
        tokens = sum(slot.target_tokens for slot in fed)
        merged.append(dataclasses.replace(fed[0] if fed else slots[first], target_tokens=tokens))
    return merged
