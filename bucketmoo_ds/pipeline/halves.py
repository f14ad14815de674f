"""Two halves of a language's micro-batches, whose products are free of noise on the diagonal of a Gram (`gram: cross`).

The row of a language is `a + b`, the parts that the two halves of its micro-batches make of it, and each is stored by
itself. A micro-batch is drawn independently of the others, so that `<a, b>` is, up to how many tokens either half has,
the squared length of the *expected* row, where `||a + b||^2` is longer by the variance: a language whose gradients are
noisy looks long and nearly orthogonal to all others, and min-norm rules turn to the quiet ones.

    G_ij = <a_i + b_i, a_j + b_j>            i != j: unbiased as it stands
    G_ii = <a_i, b_i> N_i^2 / (n_a n_b)      of N_i target tokens n_a and n_b in the halves

Such a Gram may be indefinite, and the rule sees the nearest positive semidefinite one, "nearest" in units of the rows'
lengths, so that no loud language decides for a quiet one.

**Directions from the one, lengths from the other.** The weights multiply rows that have their noise. In mode `mixed`
(`pipeline/estimate.py`) the rows are never there, so that the rule itself has to be shown how long they will be. Here
they are, and their plain Gram is at hand: the rule sees the unbiased one, and what depends on lengths alone
(`normalize`, `rescale`, and that no combined row is longer than the rule means it to be) is measured by the plain one;
see `aggregate.solve`. A language of a single micro-batch has one half, and is shown with its noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.nearest import nearest_semidefinite
from bucketmoo_ds.data.batch import Row, Slot
from bucketmoo_ds.transfer import to_device


class Halves:
    """Which half each slot counts for. It follows from the slots of all ranks, so that all ranks know it alike.

    The micro-batches of a micro-step, largest first, each go to the half of their language that has fewer tokens. Where
    a rank adds up its micro-steps, another half is another sum, and another exchange: it stays in the half that it has
    unless the other one is empty.

    Args:
        num_languages: K.
        sticks: whether ranks add up their micro-steps.
        apart: whether they can keep several sums; else a rank keeps one half for the window.
    """

    def __init__(self, num_languages: int, sticks: bool, apart: bool) -> None:
        self._count = num_languages
        self._sticks = sticks
        self._apart = apart
        self.clear()

    def clear(self) -> None:
        """Starts the next window."""
        self.target_tokens = [[0, 0] for _ in range(self._count)]

    def assign(self, units: Sequence[Sequence[Slot]], fed: Sequence[Mapping[Row, Slot]]) -> list[Slot]:
        """Returns the slots of a micro-step with their halves, rank by rank.

        Args:
            units: the slots of the ranks that must be of one half, one after the other: of a rank, or of a node.
            fed: of each rank, the rows that it has added to in this window.
        """
        ranks = iter(range(len(fed)))
        of_unit = [[next(ranks) for _ in unit] for unit in units]
        tokens = [sum(slot.target_tokens for slot in unit) for unit in units]
        found = [slot for unit in units for slot in unit]
        for index in sorted(range(len(units)), key=lambda index: (-tokens[index], index)):
            if tokens[index] == 0:
                continue
            language = next(slot.language for slot in units[index] if slot.target_tokens)
            has = {half for rank in of_unit[index] for of, half in fed[rank] if of == language}
            half = self._half(language, has)
            self.target_tokens[language][half] += tokens[index]
            for rank in of_unit[index]:
                if found[rank].language == language:
                    found[rank] = dataclasses.replace(found[rank], half=half)
        return found

    def _half(self, language: int, has: set[int]) -> int:
        filled = self.target_tokens[language]
        lesser = int(filled[1] < filled[0])
        if not (self._sticks and has) or lesser in has:
            return lesser
        return lesser if self._apart and not filled[lesser] else 1 - lesser


@dataclasses.dataclass(frozen=True)
class Folding:
    """How the Grams of stored rows become those of languages. All tensors lie on the device of the Grams.

    Args:
        first, second: `[K']` int64, the stored rows of each language's halves; R, one past the last, for none.
        factor: `[K']` float64: `N^2 / (n_a n_b)`, 0 where there is one half only.
        language: `[R]` int64, the language of each stored row, as a place among those present.
    """

    first: Tensor
    second: Tensor
    factor: Tensor
    language: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[Row], present: Sequence[int], tokens: Sequence[Sequence[int]], device: torch.device
    ) -> Folding:
        """Of a window's stored rows, its languages, and the tokens of each language's halves."""
        place = {row: number for number, row in enumerate(rows)}
        places = [[place.get((each, half), len(rows)) for each in present] for half in (0, 1)]
        factors = [(a + b) ** 2 / (a * b) if a and b else 0.0 for a, b in (tokens[each] for each in present)]
        return cls(
            to_device(places[0], torch.int64, device),
            to_device(places[1], torch.int64, device),
            to_device(factors, torch.float64, device),
            to_device([present.index(language) for language, _ in rows], torch.int64, device),
        )

    def fold(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the Grams `[B, K', K']` of the languages, unbiased, and those with their noise.

        Args:
            gram: `[B, R, R]` float64, of the parts that the stored rows are of the languages' rows.
        """
        padded = torch.nn.functional.pad(gram, (0, 1, 0, 1))
        both = (self.first, self.second)
        parts = [[padded.index_select(1, i).index_select(2, j) for j in both] for i in both]
        noisy = (parts[0][0] + parts[1][1]) + (parts[0][1] + parts[1][0])
        lengths = noisy.diagonal(dim1=1, dim2=2)
        crossed = torch.where(self.factor > 0.0, parts[0][1].diagonal(dim1=1, dim2=2) * self.factor, lengths)
        # What is not finite in one half is not in the other's products with it.
        crossed = torch.where(lengths.isfinite(), crossed, lengths)
        return noisy + torch.diag_embed(crossed - lengths), noisy


def shown(crossed: Tensor, noisy: Tensor) -> Tensor:
    """Returns what the rule sees, `[B, K', K']`: the positive semidefinite matrices nearest to the unbiased Grams, in
    units of the lengths of the rows as they are.

    Args:
        crossed, noisy: as `Folding.fold` returns them.
    """
    lengths = noisy.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    units = torch.where(lengths > 0.0, lengths, 1.0)
    units = units.unsqueeze(2) * units.unsqueeze(1)
    return nearest_semidefinite(crossed / units) * units
