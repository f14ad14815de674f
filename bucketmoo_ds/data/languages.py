"""The one table of languages: names, indices and whatever data loaders make of them, to the index of a language.

Sampler, micro-batches and the applications ask the same object, so that one value is one language everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bucketmoo_ds.errors import ConfigError, LanguageError, did_you_mean

if TYPE_CHECKING:  # training needs no numpy, data sets do
    import numpy as np
    from numpy.typing import NDArray


class LanguageTable:
    """The K languages of a run, in the order of their indices.

    A language is written as its name (`str`, or `bytes` in UTF-8) or as its index (`int`), bare, as NumPy's number or
    text, or as an array or tensor without dimensions. Truth values and fractions are no indices.

    Args:
        names: the K names, each once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._index = {name: index for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def index(self, value: object) -> int:
        """Returns the index of the language that a value means.

        Raises:
            LanguageError: it means none.
        """
        value = plain(value)
        if isinstance(value, str):
            if value in self._index:
                return self._index[value]
            raise LanguageError(
                f'language "{value}" is not in bucket_moo.languages ({", ".join(self.names)})'
                f"{did_you_mean(value, self.names)}"
            )
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self):
            return value
        raise LanguageError(f"language {value!r}: expected a name, or an index from 0 to {len(self) - 1}")

    def index_of_batch(self, value: object) -> int:
        """Returns the index of the language of a micro-batch: a value of `index`, or a list, tuple, array or tensor of
        one for each of its rows.

        Raises:
            LanguageError: the rows are of several languages, or of none.
        """
        value = plain(value)
        if not isinstance(value, (list, tuple)):
            return self.index(value)
        different = {repr(item): item for item in map(plain, value)}
        if len(different) != 1:
            names = ", ".join(sorted(str(item) for item in different.values()))
            raise LanguageError(
                f"a micro-batch of several languages ({names or 'none'}): each micro-batch is of one language, as "
                "LanguageBatchSampler draws them"
            )
        return self.index(next(iter(different.values())))

    def column(self, values: Sequence[object], codes: NDArray[np.integer], source: str) -> NDArray[np.int32]:
        """Returns the index of the language of every row, `[rows]`, where row i has the value `values[codes[i]]`.
        Values that no row has may mean anything.

        Raises:
            ConfigError: a row is of none of the languages; the message begins with `source`.
        """
        import numpy as np

        indices = np.full(len(values), -1, dtype=np.int32)
        for code in np.unique(codes).tolist():
            try:
                indices[code] = self.index(values[code])
            except LanguageError as error:
                row = int(np.argmax(codes == code))
                raise ConfigError(f"{source}, row {row}: {error}. Filter such rows out, or list the language") from None
        return indices[codes]

    def check_classes(self, class_names: Sequence[str], used: Sequence[int], column: str) -> None:
        """Checks that the numbers of a `ClassLabel` are the indices of the languages of the same names.

        A loader puts the numbers into the micro-batches, where nothing tells any more which names they stand for: were
        the orders different, a micro-batch would count for another language.

        Args:
            class_names: the names of the classes, in the order of their numbers.
            used: the numbers that rows have.

        Raises:
            ConfigError: the number of a class that is used is not the index of its language, or it is no language.
        """
        for number in used:
            name = class_names[number] if 0 <= number < len(class_names) else None
            if name is None or self._index.get(name) == number:
                continue
            if name not in self._index:
                raise ConfigError(
                    f'column "{column}": "{name}", number {number} of its ClassLabel, is not in languages = '
                    f"{list(self.names)}{did_you_mean(name, self.names)}. Filter such rows out, or list the language"
                )
            order = [*self.names, *(each for each in class_names if each not in self._index)]
            aligned = {each: index for index, each in enumerate(order)}
            raise ConfigError(
                f'column "{column}": "{name}" is number {number} of its ClassLabel, but number {self._index[name]} in '
                f"languages = {list(self.names)}: micro-batches hold the numbers and would count for another language. "
                f'Number the column anew, dataset.align_labels_with_mapping({aligned}, "{column}"), or list the '
                "languages in its order"
            )


def plain(value: object) -> object:
    """Returns NumPy's and torch's values as Python's, and bytes as text where they are text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
