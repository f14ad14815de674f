"""The section `bucket_moo` of the files that training tools read: what `LanguageTrainerMixin` takes."""

from __future__ import annotations

from collections.abc import Mapping
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
