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

from bucketmoo_ds.data.batch import Row, Slot
from bucketmoo_ds.pipeline.halves import Halves


class Window:
    """The slots of the current window, equal on all ranks. What follows from them is worked out once, as they come.

    Args:
        num_languages: K.
        weighting: `language` or `token`, see `BucketMOOConfig`.
        once_a_window: whether gradients are exchanged once a window: each rank adds up its micro-steps until then.
        apart: whether it keeps the sums of its languages apart, and exchanges one after the other; else it must keep
            one language for the window.
        probe: the language whose row is in the Gram only, if there is one.
        crossed: whether each language has two rows, of two halves of its micro-batches (`pipeline/halves.py`).
        together: ranks of a node, whose gradients are added up before they are rows, where they go by node.

    Attributes:
        micro_steps: how many have come.
        target_tokens: of every language so far, `[K]`.
        present: the languages that fed at least one target token, ascending.
        rows: the rows that they have, ascending: one each, or two where Grams are crossed.
        latest: the slots of the latest micro-step, rank by rank.
        parts: how many exchanges carry what the ranks hold now: where they have added up several rows, as many as the
            rank with the most of them.
    """

    def __init__(
        self,
        num_languages: int,
        weighting: str,
        once_a_window: bool,
        apart: bool = False,
        *,
        probe: int | None = None,
        crossed: bool = False,
        together: int = 1,
    ) -> None:
        self.num_languages = num_languages
        self.weighting = weighting
        self.once_a_window = once_a_window
        self.apart = apart
        self._halves = Halves(num_languages, once_a_window, apart) if crossed else None
        self._together = together
        self._probe = probe
        self.clear()

    def clear(self) -> None:
        """Starts the next window."""
        self.micro_steps = 0
        self.target_tokens = [0] * self.num_languages
        self.present: list[int] = []
        self.latest: list[Slot] = []
        self.parts = 1
        self.rows: list[Row] = []
        self._first_slot: dict[Row, Slot] = {}  # of a row that has been fed tokens, over all ranks
        self._fed: list[dict[Row, Slot]] = []  # of each rank: its rows in order, each with its first slot
        self._sources: list[list[Slot]] = []
        if self._halves is not None:
            self._halves.clear()

    def add(self, slots: Sequence[Slot]) -> None:
        """Appends a micro-step: the slots of all ranks."""
        self.micro_steps += 1
        self._fed = self._fed or [{} for _ in slots]
        self.latest = self._halved(slots)
        for fed, slot in zip(self._fed, self.latest, strict=True):
            if slot.target_tokens > 0:
                self.target_tokens[slot.language] += slot.target_tokens
                self._first_slot.setdefault(slot.row, slot)
                fed.setdefault(slot.row, slot)
        self.rows = sorted(self._first_slot)
        self.present = sorted({language for language, _ in self.rows})
        self.parts = max(1, *(len(fed) for fed in self._fed)) if self.once_a_window else 1
        self._sources = [self._sources_of(part) for part in range(self.parts)]

    def changed_language(self, slots: Sequence[Slot]) -> tuple[int, int] | None:
        """Returns the first rank whose language differs from its earlier micro-steps where that is not allowed, and
        that earlier language."""
        if not self.once_a_window or self.apart or not self.latest:
            return None
        # Without a token so far, any of its slots tells.
        kept = [next(iter(fed), slot.row)[0] for fed, slot in zip(self._fed, self.latest, strict=True)]
        pairs = enumerate(zip(kept, slots, strict=True))
        return next(((rank, language) for rank, (language, now) in pairs if language != now.language), None)

    def rows_of(self, rank: int) -> list[Row]:
        """Returns the rows that a rank has fed in this window, in the order in which they came."""
        return list(self._fed[rank])

    def own_factor(self, rank: int) -> float:
        """Returns by what a rank's latest gradient is multiplied where it adds up micro-steps itself; 1 for its first
        gradient of the row, whose scale then holds for the sum, and 0 where it fed no token, so that its gradient
        is no number."""
        latest = self.latest[rank]
        if latest.target_tokens == 0:
            return 0.0
        return latest.scale / self._fed[rank][latest.row].scale

    def sources(self, part: int = 0) -> list[Slot]:
        """Returns, rank by rank, the slot that stands for what the rank exchanges in this part."""
        return self._sources[part]

    def reference_scale(self, row: Row) -> float:
        """Returns the scale of the row's first slot. Rows are kept in its units, so that equal micro-batches are
        added without a single rounding beyond the sum's own."""
        return self._first_slot[row].scale

    def coefficients(self) -> list[float]:
        """Returns, for each of `rows`, what the stored row has to be multiplied by (see the module)."""
        return [self.reference_scale(row) * self._share(row[0]) for row in self.rows]

    @property
    def trained(self) -> list[int]:
        """The languages present that take part in the combined gradient."""
        return [language for language in self.present if language != self._probe]

    def units(self) -> list[float]:
        """Returns, for each language present, the length of its row in units of its mean per token."""
        return [self._share(language) * self.target_tokens[language] for language in self.present]

    def _share(self, language: int) -> float:
        if self.weighting == "language":
            return 1.0 / self.target_tokens[language]
        return len(self.trained) / sum(self.target_tokens[each] for each in self.trained)

    @property
    def half_tokens(self) -> list[list[int]]:
        """The target tokens of each language's halves, `[K][2]`, where Grams are crossed."""
        assert self._halves is not None
        return self._halves.target_tokens

    @property
    def of_one_half(self) -> list[int]:
        """The languages that have fed one half only, where Grams are crossed: noise stays on their diagonal."""
        return [] if self._halves is None else [each for each in self.present if not all(self.half_tokens[each])]

    def _halved(self, slots: Sequence[Slot]) -> list[Slot]:
        if self._halves is None:
            return list(slots)
        size = self._together if merged_by_node(slots, self._together) is not None else 1
        return self._halves.assign([slots[first : first + size] for first in range(0, len(slots), size)], self._fed)

    def _sources_of(self, part: int) -> list[Slot]:
        if not self.once_a_window:
            return self.latest
        each = zip(self._fed, self.latest, strict=True)
        return [list(fed.values())[part] if part < len(fed) else Slot(now.language, 0, 0.0) for fed, now in each]


def merged_by_node(slots: Sequence[Slot], ranks_per_node: int) -> list[Slot] | None:
    """Returns one slot for each node, which stands for the sum of its ranks' gradients in units of that slot's scale;
    `None` where the ranks of a node train on several languages, or have halves that differ."""
    merged = []
    for first in range(0, len(slots), ranks_per_node):
        fed = [slot for slot in slots[first : first + ranks_per_node] if slot.target_tokens > 0]
        if len({slot.row for slot in fed}) > 1:
            return None
        tokens = sum(slot.target_tokens for slot in fed)
        merged.append(dataclasses.replace(fed[0] if fed else slots[first], target_tokens=tokens))
    return merged
