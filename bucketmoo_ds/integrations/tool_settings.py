"""The section `bucket_moo` of the files that training tools read: what `LanguageTrainerMixin` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.integrations.language_column import LanguageColumn

# What stands in the section beside the settings of `BucketMOOConfig`.
_OF_THE_DATA = ("language_column", "aliases", "sampler")


class ToolSettings:
    """The section of a tool's file.

    Args:
        section: the settings of `BucketMOOConfig` and, beside them, `language_column`, `aliases` and `sampler`, see
            `LanguageTrainerMixin`.

    Attributes:
        config: the settings.
        column: reads the language of the tool's rows.

    Raises:
        ConfigError: there is no section, or see `BucketMOOConfig`.
    """

    def __init__(self, section: Mapping[str, Any] | None) -> None:
        if not section:
            raise ConfigError(
                f"{SECTION}: there is no such section; expected one that names the languages, {SECTION}: "
                "{languages: [de, fr]}, and, to train without it, {enabled: false}"
            )
        rest = {name: value for name, value in section.items() if name not in _OF_THE_DATA}
        self._data = {name: section[name] for name in _OF_THE_DATA if name in section}
        self.config = BucketMOOConfig(**rest)
        self.column = LanguageColumn(
            self.config, self._data.get("language_column", "language"), self._data.get("aliases")
        )

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Those of `LanguageTrainerMixin`."""
        return {"moo": self.config, **self._data}


def prepared_apart(
    rows: Any, column: LanguageColumn, prepare: Callable[[Any], Any], *, language: str | None = None, name: str = ""
) -> Any:
    """Prepares (tokenizes, splits, packs) the rows of each language by themselves, and gives what comes of them the
    column: whatever a tool drops, or makes of a row, the language is known.

    Args:
        rows: a `datasets.Dataset`.
        column: says the language of a row.
        prepare: the tool's; from rows to rows.
        language: that of all rows; left out, their column says it.
        name: of the data, for errors.

    Raises:
        ConfigError: neither says a row's language.
        LanguageError: what is said is none of the languages.
    """
    from datasets import concatenate_datasets

    if language is not None:
        parts = [(column.index(language), rows)]
    elif column.name in rows.column_names:
        of_rows = column.of_rows(rows)
        parts = [(each, rows.select((of_rows == each).nonzero()[0])) for each in sorted(set(of_rows.tolist()))]
    else:
        raise ConfigError(
            f'the data set {name} has no column "{column.name}" (it has {", ".join(rows.column_names)}), and its entry '
            f"does not say `language:`: say the language of all its rows there, or of each in a column, "
            f"{SECTION}.language_column"
        )
    told = []
    for index, part in parts:
        prepared = prepare(part)
        if column.name in prepared.column_names:
            prepared = prepared.remove_columns(column.name)
        told.append(prepared.add_column(column.name, [column.names[index]] * len(prepared)))
    return concatenate_datasets(told)
