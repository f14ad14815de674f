"""The column of a data set that says the language of a row, and the collator that brings it into micro-batches.

Both modes of `LanguageTrainerMixin` and its evaluation ask it, so that one value is one language everywhere: a name, an
index, a number of a ClassLabel (by name, whatever its order), or another spelling of one of the languages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.languages import LanguageTable, plain
from bucketmoo_ds.data.sampler import class_names, distinct_values
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.integrations.aliases import meant

NONE = -1  # of a token that is of no language


class LanguageColumn(LanguageTable):
    """The K languages, as a column writes them.

    Args:
        config: gives the languages, and the entry of a micro-batch.
        name: the column's.
        aliases: what else the column writes, and which language it means.

    Raises:
        ConfigError: an alias means none of the languages.
    """

    def __init__(self, config: BucketMOOConfig, name: str, aliases: Mapping[str, str] | None = None) -> None:
        super().__init__(config.languages)
        self.name = name
        self.key = config.language_key
        self._aliases = dict(aliases or {})
        for written, language in self._aliases.items():
            if language not in self.names:
                raise ConfigError(
                    f'aliases = {{"{written}": "{language}"}}: "{language}" is not in languages = {list(self.names)}'
                )

    def index(self, value: object) -> int:
        """See `LanguageTable`; a name may be an alias, or another usual spelling where it can mean one language only.

        Raises:
            LanguageError: it means none.
        """
        value = plain(value)
        if isinstance(value, str) and value not in self.names:
            known = meant(value, self.names)
            value = self._aliases.get(value, known[0] if len(known) == 1 else value)
            if len(known) > 1 and value not in self.names:
                raise LanguageError(
                    f'language "{value}" may mean {" or ".join(known)}: say which, aliases={{"{value}": "{known[0]}"}}'
                )
        return super().index(value)

    def reader(self, dataset: Any) -> Callable[[Any], int]:
        """Returns what gives the index of a language as this data set's column writes it; -1, for none, stays."""
        classes = self._classes(dataset)

        def index(value: Any) -> int:
            value = plain(value)  # NumPy's numbers, too, are those of the ClassLabel
            if isinstance(value, int) and not isinstance(value, bool):
                if value == NONE:
                    return NONE
                if classes is not None:
                    if not 0 <= value < len(classes):
                        raise LanguageError(f"{value} is no number of the column's ClassLabel {list(classes)}")
                    return self.index(classes[value])
            return self.index(value)

        return index

    def of_rows(self, dataset: Any) -> NDArray[np.int32]:
        """Returns the index of the language of every row, `[rows]`.

        Raises:
            ConfigError: there is no such column, the rows cannot be counted, or one of them is of no language.
        """
        values, codes = distinct_values(dataset, self.name)
        classes = self._classes(dataset)
        if classes is not None:
            numbers = dict(enumerate(classes))
            values = [numbers.get(value) if isinstance(value, int) else value for value in values]
        return self.column(values, codes, f'column "{self.name}"')

    def check(self, dataset: Any) -> None:
        """Raises `ConfigError` where the training data has no such column."""
        names = getattr(dataset, "column_names", None)
        if names is not None and self.name not in names:
            raise ConfigError(
                f'the training data has no column "{self.name}" (it has {", ".join(names)}): add one that says the '
                "language of each row, or name it, language_column=..."
            )

    def _classes(self, dataset: Any) -> Sequence[str] | None:
        """The names of a ClassLabel, of rows or of their tokens."""
        feature = (getattr(dataset, "features", None) or {}).get(self.name)
        of_tokens = getattr(getattr(feature, "feature", None), "names", None)
        found = class_names(dataset, self.name) if of_tokens is None else [of_tokens]
        if any(names != found[0] for names in found):
            raise ConfigError(f'column "{self.name}": its parts number their ClassLabel differently; cast them to one')
        return found[0] if found else None


class LanguageCollator:
    """A collator that puts the languages of its rows beside what another one makes of them; rows without any, as
    evaluation may have them, go to the other as they are.

    Args:
        collator: the other; it does not see the column.
        column: the column of the rows.
        dataset: what they come from.
        as_tensors: whether all entries are tensors, which Accelerate needs where the first rank reads for all.

    Raises:
        LanguageError: a row is of none of the languages.
    """

    def __init__(
        self, collator: Callable[..., Any], column: LanguageColumn, dataset: Any, as_tensors: bool = False
    ) -> None:
        self._collator = collator
        self._column = column.name
        self._key = column.key
        self._index = column.reader(dataset)
        self._as_tensors = as_tensors

    def __call__(self, features: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """Returns the micro-batch with one more entry: a list of an index for each row, which no device has to be asked
        for; or `[batch, sequence]` where rows say it by token or are laid one after the other."""
        if not any(self._column in feature for feature in features):
            return self._collator(features, *args, **kwargs)
        told = [feature[self._column] for feature in features]
        rest = [{name: each for name, each in feature.items() if name != self._column} for feature in features]
        lengths = [len(feature.get("input_ids", ())) for feature in features]
        batch = self._collator(rest, *args, **kwargs)
        by_row = [[self._index(each) for each in row] if _is_list(row) else [self._index(row)] for row in told]
        shape: Sequence[int] = batch["input_ids"].shape if "input_ids" in batch else ()
        flattened = len(shape) == 2 and shape[0] == 1 and len(features) > 1
        if not flattened and not any(_is_list(row) for row in told):
            batch[self._key] = torch.tensor(by_row).flatten() if self._as_tensors else [row[0] for row in by_row]
            return batch
        pairs = zip(by_row, lengths, strict=True)
        tokens = [torch.tensor(row * length if len(row) == 1 else row) for row, length in pairs]
        batch[self._key] = _laid_out([torch.cat(tokens)] if flattened else tokens, shape, batch.get("attention_mask"))
        return batch


def _laid_out(tokens: Sequence[Tensor], shape: Sequence[int], attention_mask: Tensor | None) -> Tensor:
    """The languages `[batch, sequence]` of rows of tokens, padded on the side where the tokens are; -1 elsewhere."""
    languages = torch.full(tuple(shape), NONE)
    for row, each in enumerate(tokens):
        left = attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[row, 0])
        start = shape[1] - len(each) if left else 0
        languages[row, start : start + len(each)] = each
    return languages


def _is_list(told: object) -> bool:
    return isinstance(told, (list, tuple)) or getattr(told, "ndim", 0) > 0
