"""The user's own training data for `bucketmoo train`, whatever it comes in.

    data:
      path: corpus.jsonl            # or .parquet, a folder of text by language, a list of files
      text_column: text
      language_column: language

    data:
      dataset: user/name            # anything datasets.load_dataset takes, or a folder of Dataset.save_to_disk
      split: train

Rows of text are packed (see `packing`); rows that already have `input_ids`, `labels` and a language are passed through
as they are. Whatever is wrong with the data stops the run before it starts, with the file, the row and the setting.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bucketmoo_ds.apps.corpus import folder
from bucketmoo_ds.apps.corpus.packing import FEATURES, pack
from bucketmoo_ds.apps.corpus.pages import texts as texts_of
from bucketmoo_ds.errors import ConfigError, did_you_mean

_TOKENISED = ("input_ids", "labels")
_ROWS_A_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where training data is; exactly one of `path` and `dataset` is set.

    Attributes:
        path: JSON lines (`.jsonl`, `.json`), Parquet (`.parquet`), a list of such files, or a folder of text by
            language (see `folder`).
        dataset: name or folder for `datasets.load_dataset`, or a folder written by `Dataset.save_to_disk`.
        subset: configuration of `dataset`.
        split: split of `dataset`.
        text_column: column with the text.
        language_column: column with the name of the language.
    """

    path: str | Sequence[str] | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    language_column: str = "language"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(
                f"data.path = {self.path!r}, data.dataset = {self.dataset!r}: expected exactly one of the two"
            )

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> "DataSpec":
        """Read the `data` section of a configuration; raises ConfigError for a setting there is not."""
        known = [field.name for field in fields(cls)]
        for name in section:
            if name not in known:
                guess = did_you_mean(name, known) or "."
                raise ConfigError(f"data.{name}: unknown{guess} Expected: {', '.join(known)}")
        return cls(**section)


def load_training_data(
    spec: DataSpec,
    languages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_length: int | None = None,
    remainder: Literal["drop", "pad"] = "drop",
) -> Dataset:
    """Load, check and, unless it is tokenised already, pack training data.

    Args:
        spec: where it is.
        languages: the run's languages; data in another one is an error, and so is a language without data.
        tokenizer: for text.
        sequence_length: tokens in a packed sequence, for text.
        remainder: see `packing.pack`.

    Returns:
        Map-style dataset with columns `input_ids`, `labels` and `language`.

    Raises:
        ConfigError: the data is missing, has not the named columns, has an empty text or an unknown language, or is
            text while `tokenizer` or `sequence_length` is None.
    """
    sources = list(_open(spec)) if _text_folder(spec) is None else []
    kinds = {_is_tokenised(source) for source in sources}
    if len(kinds) > 1:
        raise ConfigError(f"{_setting(spec)}: some files are text and some are tokenised; expected one kind")
    if kinds == {True}:
        parts = [_checked_tokens(source, spec, languages) for source in sources]
        _require_all({name for part in parts for name in part.unique("language")}, languages, spec)
        return datasets.concatenate_datasets(parts)

    if tokenizer is None or sequence_length is None:
        raise ConfigError(f"{_setting(spec)}: is text, which needs a tokenizer and a sequence_length")
    return pack(load_texts(spec, languages), tokenizer, sequence_length, remainder)


def load_texts(spec: DataSpec, languages: Sequence[str]) -> dict[str, list[str]]:
    """Load and check texts by language, for training or evaluation.

    Raises:
        ConfigError: as `load_training_data`.
    """
    if (root := _text_folder(spec)) is not None:
        texts = texts_of(folder.read(root, languages))
    else:
        texts = {language: [] for language in languages}
        for source in _open(spec):
            _add_texts(texts, source, spec)
    _require_all({language for language, found in texts.items() if found}, languages, spec)
    return texts


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of one file or dataset, and how an error names it."""

    name: str
    rows: Dataset
    row: str = "row"

    def at(self, index: int) -> str:
        return f"{self.name}, {self.row} {index + 1}"


def _setting(spec: DataSpec) -> str:
    return f"data.dataset = {spec.dataset!r}" if spec.dataset is not None else f"data.path = {spec.path!r}"


def _text_folder(spec: DataSpec) -> Path | None:
    return Path(spec.path) if isinstance(spec.path, str) and Path(spec.path).is_dir() else None


def _open(spec: DataSpec) -> Iterator[_Source]:
    if spec.dataset is not None:
        yield _open_dataset(spec, spec.dataset)
        return
    paths = [spec.path] if isinstance(spec.path, str) else list(spec.path or ())
    if not paths:
        raise ConfigError(f"{_setting(spec)}: names no file")
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"data.path = {str(path)!r}: no such file; several files go into a list")
        if path.suffix == ".parquet":
            yield _open_parquet(path)
        elif path.suffix in (".jsonl", ".json"):
            yield _open_json_lines(path)
        else:
            raise ConfigError(
                f"data.path = {str(path)!r}: unknown kind of file; expected .jsonl, .json (an object a line), .parquet "
                "or a folder of text by language"
            )


def _open_json_lines(path: Path) -> _Source:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ConfigError(
                    f"data.path: {path}, line {number}: not JSON ({error}); expected an object a line"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(f"data.path: {path}, line {number}: expected an object, got {type(row).__name__}")
            if rows and row.keys() != rows[0].keys():
                odd = sorted(row.keys() ^ rows[0].keys())
                raise ConfigError(f"data.path: {path}, line {number}: other columns than line 1: {', '.join(odd)}")
            rows.append(row)
    if not rows:
        raise ConfigError(f"data.path = {str(path)!r}: the file is empty")
    try:
        table = Dataset.from_list(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ConfigError(f"data.path = {str(path)!r}: a column has values of different types: {error}") from error
    return _Source(f"data.path: {path}", table, row="line")


def _open_parquet(path: Path) -> _Source:
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"data.path = {str(path)!r}: not a Parquet file: {error}") from error
    return _Source(f"data.path: {path}", Dataset(table))


def _open_dataset(spec: DataSpec, name: str) -> _Source:
    if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if spec.split not in found:
                guess = did_you_mean(spec.split, found) or "."
                raise ConfigError(f"data.split = {spec.split!r}: not in {name}{guess} It has: {', '.join(found)}")
            found = found[spec.split]
    else:
        try:
            found = datasets.load_dataset(name, spec.subset, split=spec.split)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(
                f"data.dataset = {name!r}, data.subset = {spec.subset!r}, data.split = {spec.split!r}: {error}"
            ) from error
    return _Source(f"data.dataset: {name} ({spec.split})", found)


def _is_tokenised(source: _Source) -> bool:
    return "input_ids" in source.rows.column_names


def _require_columns(source: _Source, columns: Mapping[str, str]) -> None:
    """Raise for the first of `columns` (name -> the setting that names it) that the source does not have."""
    known = source.rows.column_names
    for column, setting in columns.items():
        if column not in known:
            raise ConfigError(
                f'{source.name}: no column "{column}" ({setting}){did_you_mean(column, known) or "."} '
                f"It has: {', '.join(known)}"
            )
    if not len(source.rows):
        raise ConfigError(f"{source.name}: has no rows")


def _check_language(value: object, languages: Sequence[str], source: _Source, index: int, spec: DataSpec) -> None:
    if value not in languages:
        raise ConfigError(
            f"{source.at(index)}: {spec.language_column} = {value!r} (data.language_column) is not one of the run's "
            f"languages {', '.join(languages)}{did_you_mean(str(value), languages)}"
        )


def _require_all(found: set[str], languages: Sequence[str], spec: DataSpec) -> None:
    if missing := [language for language in languages if language not in found]:
        raise ConfigError(
            f"{_setting(spec)}: no data in language {', '.join(missing)}; add some, or take it off the languages"
        )


def _add_texts(texts: dict[str, list[str]], source: _Source, spec: DataSpec) -> None:
    text_column, language_column = spec.text_column, spec.language_column
    _require_columns(source, {text_column: "data.text_column", language_column: "data.language_column"})
    rows = source.rows.select_columns([text_column, language_column])
    for start in range(0, len(rows), _ROWS_A_BATCH):
        batch = rows[start : start + _ROWS_A_BATCH]
        for index, (text, language) in enumerate(zip(batch[text_column], batch[language_column], strict=True), start):
            _check_language(language, list(texts), source, index, spec)
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(
                    f"{source.at(index)}: {text_column} = {text!r} (data.text_column): expected text, not empty"
                )
            texts[language].append(text)


def _checked_tokens(source: _Source, spec: DataSpec, languages: Sequence[str]) -> Dataset:
    settings = {"input_ids": "token ids", "labels": "input_ids, with -100 where no loss is taken"}
    _require_columns(source, settings | {spec.language_column: "data.language_column"})
    rows = source.rows.select_columns([*_TOKENISED, spec.language_column])
    for start in range(0, len(rows), _ROWS_A_BATCH):
        batch = rows[start : start + _ROWS_A_BATCH]
        columns = (batch["input_ids"], batch["labels"], batch[spec.language_column])
        for index, (inputs, labels, language) in enumerate(zip(*columns, strict=True), start):
            _check_language(language, languages, source, index, spec)
            if not _are_ids(inputs) or not _are_ids(labels) or len(inputs) != len(labels):
                raise ConfigError(
                    f"{source.at(index)}: expected input_ids and labels to be integer lists of one length, not empty"
                )
    if spec.language_column != "language":
        rows = rows.rename_column(spec.language_column, "language")
    return rows.cast(FEATURES)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
