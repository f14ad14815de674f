"""One forward pass of mixed languages: where its tokens are among the rows that a module sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters.mixed.products import Groups
from bucketmoo_ds.data.rows import Rows
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.transfer import ToHost


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """The rows that a module sees, flattened.

    Args:
        languages: `[n]` int64, the column of each row in the table of weights; K for no language.
        groups: where Grams are taken.
    """

    languages: Tensor
    groups: LateGroups | None


class LateGroups:
    """The groups of the rows of one shape. Their sizes are on their way to the host, and read in backward."""

    def __init__(self, of_row: Tensor, number: int) -> None:
        self._number = number
        self._of_row = of_row
        self._order = of_row.argsort(stable=True)
        counted = torch.zeros(number + 1, dtype=torch.int64, device=of_row.device)
        self._sizes = ToHost(counted.scatter_add_(0, of_row, torch.ones_like(of_row)))

    def read(self) -> Groups:
        """Returns the groups."""
        return Groups(self._number, self._of_row, self._order, self._sizes.read().tolist())


class Pass:
    """A forward pass.

    Args:
        rows: the languages of its tokens.
        num_languages: K.
        takes_grams: whether its backward also takes Grams.

    Attributes:
        held: by parameter, the uses whose backward has come, where a parameter has several.
        uses: by parameter, how often it is used.
        reached: to be called when a backward has come to one of its uses; the session sets it.
    """

    def __init__(self, rows: Rows, num_languages: int, takes_grams: bool) -> None:
        self.rows = rows
        self.takes_grams = takes_grams
        self.held: dict[int, list[Any]] = {}
        self.uses: dict[int, int] = {}
        self.reached: Callable[[], None] = _nobody
        self._count = num_languages
        self._placed: dict[torch.Size, Placed | None] = {}
        self.groups = halves(rows.languages, rows.documents, num_languages) if takes_grams else None

    def placed(self, leading: torch.Size) -> Placed | None:
        """Returns where the rows of an activation `[*leading, features]` belong; `None` where they are not the batch's.
        """
        if leading not in self._placed:
            self._placed[leading] = self._place(leading)
        return self._placed[leading]

    def expanded(self, indices: Tensor, positions: bool) -> Tensor:
        """Returns the indices that go into an embedding, for every sequence of the batch where all share them: places
        in a sequence, `[length]` or `[1, length]`; those of a decoder, of another length, if it says `positions`."""
        batch, sequence = self.rows.languages.shape
        row = indices.squeeze(0) if indices.dim() == 2 else indices
        length = row.shape[-1] if row.dim() == 1 else 0
        if batch == 1 or length in (0, batch * sequence):
            return indices
        if length != sequence and not positions:
            return indices
        if length != sequence or indices.shape == (batch,):  # places, or one for each sequence, or neither?
            here = torch.arange(length, device=row.device)
            if self.placed(torch.Size((batch, length))) is None or not torch.equal(row - row[0], here):
                return indices
        return row.expand(batch, length)

    def target_tokens_by_group(self) -> Tensor:
        """Returns the target tokens of each group, `[2 K]` float64."""
        assert self.groups is not None
        counted = torch.zeros(2 * self._count + 1, dtype=torch.float64, device=self.groups.device)
        return counted.scatter_add_(0, self.groups.flatten(), self.rows.targets.flatten().double())[:-1]

    def _place(self, leading: torch.Size) -> Placed | None:
        languages = self._spread(self.rows.languages, leading)
        if languages is None:
            return None
        languages = languages.flatten()
        columns = torch.where(languages < 0, self._count, languages)
        if self.groups is None:
            return Placed(columns, None)
        groups = self._spread(self.groups, leading)
        assert groups is not None
        return Placed(columns, LateGroups(groups.flatten(), 2 * self._count))

    def _spread(self, each: Tensor, leading: torch.Size) -> Tensor | None:
        """What tokens have, in the shape of activations `[*leading, features]`; heads may stand behind the tokens, or
        between sequences and tokens, but not so that nothing tells which are the tokens."""
        found = self.rows.groups_of_shape(each, leading)
        if found is not None or len(leading) < 2:
            return found
        batch, sequence = each.shape
        behind = self._spread(each, leading[:-1])
        behind = behind.unsqueeze(-1).expand(leading) if behind is not None else None
        if len(leading) > 2 and leading[0] == batch and leading[-1] == sequence:
            between = each.view(batch, *(1,) * (len(leading) - 2), sequence).expand(leading)
            unique = leading[1] != sequence or (behind is not None and torch.equal(behind, between))
            return between if unique else None
        return behind


def _nobody() -> None:
    raise BucketMOOError("a backward through a forward pass of the registered model that is not over yet")


def halves(languages: Tensor, documents: Tensor, num_languages: int) -> Tensor:
    """Returns the group of every token, `[batch, sequence]` int64: `2 l + h` where it is of language l and its document
    the language's n-th of the micro-batch, `h = n mod 2`; 2 K for tokens of no language.

    Args:
        languages: `[batch, sequence]` int64, -1 for none.
        documents: `[batch, sequence]` int64, the documents numbered in the order in which they begin.
    """
    flat, document = languages.flatten(), documents.flatten()
    known = flat >= 0
    language = flat.clamp(min=0)
    # The first token of each document that has a language.
    places = torch.arange(len(flat), device=flat.device)
    first = torch.full((len(flat) + 1,), len(flat), dtype=torch.int64, device=flat.device)
    first.scatter_reduce_(0, torch.where(known, document, len(flat)), places, "amin")
    begins = known & (first[document] == places)
    each = torch.arange(num_languages, device=flat.device)
    begun = (begins.unsqueeze(-1) & (language.unsqueeze(-1) == each)).to(torch.int32).cumsum(0)  # [n, K]
    ordinal = begun[first[document].clamp(max=len(flat) - 1), language] - 1
    return torch.where(known, 2 * language + ordinal % 2, 2 * num_languages).view(languages.shape)
