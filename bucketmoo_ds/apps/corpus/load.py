"""The user's own training data for `bucketmoo train`, whatever it comes in.

    data:
      path: corpus.jsonl            # or .parquet, a folder of text by language, a list of files
      text_column: text
      language_column: language

    data:
      dataset: user/name            # anything datasets.load_dataset takes, or a folder of Dataset.save_to_disk
      split: train

Rows of text are packed (see `packing`); rows that already have `input_ids`, `labels` and a language are passed through
as they are, of any length. What holds nothing to train on (blank lines, empty texts, rows without a target) is skipped,
and how much is told. Whatever else is wrong stops the run before it starts, with the file, the row and the setting.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bucketmoo_ds.apps.corpus import folder
from bucketmoo_ds.apps.corpus.packing import FEATURES, IGNORED_LABEL, pack
from bucketmoo_ds.apps.corpus.pages import texts as texts_of
from bucketmoo_ds.errors import ConfigError, did_you_mean
from bucketmoo_ds.logs import logger

_TOKENISED = ("input_ids", "labels")
_ROWS_A_BATCH = 1000

Say = Callable[[str], object]


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
    say: Say = logger.warning,
) -> Dataset:
    """Load, check and, unless it is tokenised already, pack training data.

    Args:
        spec: where it is.
        languages: the run's languages; data in another one is an error, and so is a language without data.
        tokenizer: for text.
        sequence_length: tokens in a packed sequence, for text.
        remainder: see `packing.pack`.
        say: is told what was skipped, a sentence a file.

    Returns:
        Map-style dataset with columns `input_ids`, `labels` and `language`; tokenised rows keep their lengths.

    Raises:
        ConfigError: the data is missing, has not the named columns, has a text that is none or an unknown language, or
            is text while `tokenizer` or `sequence_length` is None.
    """
    sources = list(_open(spec)) if _text_folder(spec) is None else []
    kinds = {_is_tokenised(source) for source in sources}
    if len(kinds) > 1:
        raise ConfigError(f"{_setting(spec)}: some files are text and some are tokenised; expected one kind")
    if kinds == {True}:
        parts = [_checked_tokens(source, spec, languages, say) for source in sources]
        _require_all({name for part in parts for name in part.unique("language")}, languages, spec)
        return datasets.concatenate_datasets(parts)

    if tokenizer is None or sequence_length is None:
        raise ConfigError(f"{_setting(spec)}: is text, which needs a tokenizer and a sequence_length")
    return pack(load_texts(spec, languages, say), tokenizer, sequence_length, remainder)


def load_texts(spec: DataSpec, languages: Sequence[str], say: Say = logger.warning) -> dict[str, list[str]]:
    """Load and check texts by language, for training or evaluation; `say` is told what was skipped.

    Raises:
        ConfigError: as `load_training_data`.
    """
    if (root := _text_folder(spec)) is not None:
        texts = texts_of(folder.read(root, languages))
    else:
        texts = {language: [] for language in languages}
        for source in _open(spec):
            _add_texts(texts, source, spec, say)
    _require_all({language for language, found in texts.items() if found}, languages, spec)
    return texts


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of one file or dataset, and how an error names it.

    Attributes:
        lines: for a file of lines, which one each row is; blank ones are no rows.
        blank: how many those are.
    """

    name: str
    rows: Dataset
    lines: Sequence[int] | None = None
    blank: int = 0

    def at(self, index: int) -> str:
        where = f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}"
        return f"{self.name}, {where}"

    def tell(self, skipped: int, what: str, say: Say) -> None:
        """Say how many blank lines and `what` were skipped, if any."""
        counts = {"blank line": self.blank, what: skipped}
        if any(counts.values()):
            named = [f"{count} {each}{'s' * (count != 1)}" for each, count in counts.items() if count]
            say(f"{self.name}: skipped {' and '.join(named)}")


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
    lines: list[int] = []
    with path.open("rb") as file:
        number = 0
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ConfigError(
                    f"data.path: {path}, line {number}: not JSON ({error}); expected an object a line"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(f"data.path: {path}, line {number}: expected an object, got {type(row).__name__}")
            if rows and row.keys() != rows[0].keys():
                odd = sorted(row.keys() ^ rows[0].keys())
                raise ConfigError(
                    f"data.path: {path}, line {number}: other columns than line {lines[0]}: {', '.join(odd)}"
                )
            rows.append(row)
            lines.append(number)
    if not rows:
        raise ConfigError(f"data.path = {str(path)!r}: the file is empty")
    try:
        table = Dataset.from_list(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        where = _other_type(rows, lines)
        raise ConfigError(f"data.path: {path}{where}: a column has values of different types: {error}") from error
    return _Source(f"data.path: {path}", table, lines, number - len(rows))


def _other_type(rows: Sequence[Mapping[str, Any]], lines: Sequence[int]) -> str:
    """Name the first line in which a column's value is of another type than on the lines before."""
    seen: dict[str, type] = {}
    for row, number in zip(rows, lines, strict=True):
        for column, value in row.items():
            if value is not None and type(value) is not seen.setdefault(column, type(value)):
                return f', line {number}, column "{column}"'
    return ""


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


def _add_texts(texts: dict[str, list[str]], source: _Source, spec: DataSpec, say: Say) -> None:
    text_column, language_column = spec.text_column, spec.language_column
    _require_columns(source, {text_column: "data.text_column", language_column: "data.language_column"})
    rows = source.rows.select_columns([text_column, language_column])
    empty = 0
    for start in range(0, len(rows), _ROWS_A_BATCH):
        batch = rows[start : start + _ROWS_A_BATCH]
        for index, (text, language) in enumerate(zip(batch[text_column], batch[language_column], strict=True), start):
            _check_language(language, list(texts), source, index, spec)
            if text is None or (isinstance(text, str) and not text.strip()):
                empty += 1
                continue
            if not isinstance(text, str):
                raise ConfigError(f"{source.at(index)}: {text_column} = {text!r} (data.text_column): expected text")
            texts[language].append(text)
    source.tell(empty, "empty text", say)


def _checked_tokens(source: _Source, spec: DataSpec, languages: Sequence[str], say: Say) -> Dataset:
    settings = {"input_ids": "token ids", "labels": "input_ids, with -100 where no loss is taken"}
    _require_columns(source, settings | {spec.language_column: "data.language_column"})
    rows = source.rows.select_columns([*_TOKENISED, spec.language_column])
    kept: list[int] = []
    for start in range(0, len(rows), _ROWS_A_BATCH):
        batch = rows[start : start + _ROWS_A_BATCH]
        columns = (batch["input_ids"], batch["labels"], batch[spec.language_column])
        for index, (inputs, labels, language) in enumerate(zip(*columns, strict=True), start):
            _check_language(language, languages, source, index, spec)
            if not _are_ids(inputs) or not _are_ids(labels) or len(inputs) != len(labels):
                raise ConfigError(
                    f"{source.at(index)}: expected input_ids and labels to be integer lists of one length"
                )
            if any(label != IGNORED_LABEL for label in labels[1:]):
                kept.append(index)
    source.tell(len(rows) - len(kept), "targetless row", say)
    if len(kept) < len(rows):
        rows = rows.select(kept)
    if spec.language_column != "language":
        rows = rows.rename_column(spec.language_column, "language")
    return rows.cast(FEATURES)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
