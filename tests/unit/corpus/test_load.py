"""The user's data: every kind gives the same sequences, and every mistake is named with its file and setting."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast
from unit.corpus.random_text import random_texts

from bucketmoo_ds.apps.corpus.load import DataSpec, load_texts, load_training_data
from bucketmoo_ds.apps.corpus.packing import pack
from bucketmoo_ds.errors import ConfigError

LANGUAGES = ["de", "ru", "ko"]


@pytest.fixture
def texts() -> dict[str, list[str]]:
    return random_texts(seed=21)


@pytest.fixture
def rows(texts: dict[str, list[str]]) -> list[dict[str, str]]:
    # Languages take turns, as in a shuffled file.
    return [{"text": texts[name][number], "language": name} for number in range(40) for name in texts]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write_json_lines(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def as_json(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    return DataSpec(path=write_json_lines(folder / "x.jsonl", rows))


def as_two_files(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    Dataset.from_list(rows[50:]).to_parquet(folder / "b.parquet")
    return DataSpec(path=[write_json_lines(folder / "a.json", rows[:50]), str(folder / "b.parquet")])


def as_parquet_with_other_names(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    renamed = [{"content": row["text"], "lang": row["language"], "url": "somewhere"} for row in rows]
    Dataset.from_list(renamed).to_parquet(folder / "x.parquet")
    return DataSpec(path=str(folder / "x.parquet"), text_column="content", language_column="lang")


def as_local_dataset(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    (folder / "set").mkdir()
    write_json_lines(folder / "set/train.jsonl", rows)
    write_json_lines(folder / "set/test.jsonl", rows[:3])
    return DataSpec(dataset=str(folder / "set"))


def as_builder(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    (folder / "built").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "built/part-0.parquet")
    return DataSpec(dataset=str(folder / "built"), split="train")


def as_saved_to_disk(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    DatasetDict(train=Dataset.from_list(rows[:2]), more=Dataset.from_list(rows)).save_to_disk(folder / "saved")
    return DataSpec(dataset=str(folder / "saved"), split="more")


def as_folder(folder: Path, rows: list[dict[str, str]]) -> DataSpec:
    for number, row in enumerate(rows):
        file = folder / "text" / row["language"] / f"{number:04}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row["text"], encoding="utf-8")
    return DataSpec(path=str(folder / "text"))


@pytest.mark.parametrize(
    "kind",
    [as_json, as_two_files, as_parquet_with_other_names, as_local_dataset, as_builder, as_saved_to_disk, as_folder],
)
def test_every_kind_gives_the_same_sequences(
    kind: Callable[[Path, list[dict[str, str]]], DataSpec],
    rows: list[dict[str, str]],
    texts: dict[str, list[str]],
    small_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    loaded = load_training_data(kind(tmp_path, rows), LANGUAGES, small_tokenizer, 16)
    assert loaded.to_dict() == pack(texts, small_tokenizer, 16).to_dict()


def test_tokenised_data_is_passed_through(
    texts: dict[str, list[str]], small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    packed = pack(texts, small_tokenizer, 16, "pad")
    wider = packed.add_column("extra", list(range(len(packed)))).rename_column("language", "lang")
    wider.to_parquet(tmp_path / "a.parquet")
    loaded = load_training_data(DataSpec(path=str(tmp_path / "a.parquet"), language_column="lang"), LANGUAGES)
    assert loaded.to_dict() == packed.to_dict()
    assert loaded.features == packed.features


GOOD = {"text": "abc", "language": "de"}
TOKENS = {"input_ids": [1, 2], "labels": [1, 2], "language": "de"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{"txt": "abc", "language": "de"}], r'x\.jsonl: no column "text" \(data\.text_column\); did you mean "txt"\?'),
        ([{"text": "abc", "languag": "de"}], r'"language" \(data\.language_column\); did you mean "languag"\?'),
        ([{"text": [1], "language": "de"}], r"x\.jsonl, line 1: text = \[1\] \(data\.text_column\): expected text"),
        (["", " ", GOOD, "", {"text": "abc", "language": "d"}], r"line 5: language = 'd'"),
        ([{"text": "\u00a0", "language": "de"}, {"text": "", "language": "ru"}], r"no data in language de, ru, ko"),
        ([TOKENS, TOKENS | {"labels": [1, -100]}], r"no data in language ru, ko"),
        ([GOOD, {"text": "abc", "language": "d"}], r"line 2: language = 'd' \(data\.language_column\) is not one of"),
        ([GOOD, {"text": "abc", "language": None}], r"line 2: language = None"),
        ([GOOD, {"text": "abc"}], r"line 2: other columns than line 1: language"),
        (["", GOOD, {"text": 3, "language": "de"}], r'x\.jsonl, line 3, column "text": a column has values of'),
        (["", GOOD, {"text": "abc"}], r"line 3: other columns than line 2: language"),
        ([GOOD, ["abc"]], r"line 2: expected an object, got list"),
        ([GOOD], r"no data in language ru, ko"),
        ([], r"the file is empty"),
        ([{"input_ids": [1], "language": "de"}], r'no column "labels"'),
        ([TOKENS, TOKENS | {"labels": [1]}], r"line 2: expected input_ids and labels to be integer lists"),
        ([TOKENS | {"labels": [0.5, 1.0]}], r"line 1: expected input_ids and labels to be integer"),
        ([TOKENS | {"language": "dee"}], r'line 1: language = \'dee\'.*; did you mean "de"\?'),
        ([TOKENS], r"no data in language ru, ko"),
    ],
)
def test_mistakes_are_named(
    bad: list[Any], message: str, small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    spec = DataSpec(path=write_json_lines(tmp_path / "x.jsonl", bad))
    with pytest.raises(ConfigError, match=message):
        load_training_data(spec, LANGUAGES, small_tokenizer, 16)


def test_what_holds_nothing_is_skipped_and_counted(tmp_path: Path) -> None:
    """A byte-order mark, Windows' line ends, blank lines, and texts of nothing but space leave the others alone."""
    good = [json.dumps({"text": f"text {number} \ufeff", "language": LANGUAGES[number % 3]}) for number in range(9)]
    empty = [json.dumps({"text": text, "language": "de"}) for text in ("", " \n\t", None)]
    seed = random.SystemRandom().randrange(10**6)
    lines = [*good, *empty, "", "  "]
    random.Random(seed).shuffle(lines)
    path = tmp_path / "x.jsonl"
    said: list[str] = []
    for number, (mark, end) in enumerate([("", "\n"), ("\ufeff", "\r\n")]):
        path.write_bytes((mark + end.join(lines) + end).encode())
        texts = load_texts(DataSpec(path=str(path)), LANGUAGES, said.append)
        assert {text for found in texts.values() for text in found} == {json.loads(line)["text"] for line in good}, seed
        assert said[number] == f"data.path: {path}: skipped 2 blank lines and 3 empty texts"
    path.write_text("\n".join(good))
    load_texts(DataSpec(path=str(path)), LANGUAGES, said.append)
    assert len(said) == 2, "nothing was skipped"


def test_tokenised_rows_keep_their_lengths(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [number] * (2 + number % 5), "labels": [-100] + [number] * (1 + number % 5), "language": language}
        for number, language in enumerate(LANGUAGES * 4)
    ]
    without = [
        {"input_ids": [], "labels": [], "language": "de"},
        {"input_ids": [3], "labels": [3], "language": "de"},
        {"input_ids": [3, 4], "labels": [3, -100], "language": "ko"},
    ]
    said: list[str] = []
    path = write_json_lines(tmp_path / "x.jsonl", [*rows[:3], *without, *rows[3:]])
    assert load_training_data(DataSpec(path=path), LANGUAGES, say=said.append).to_list() == rows
    assert said == [f"data.path: {path}: skipped 3 targetless rows"]


def test_broken_files(small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def load(**spec: Any) -> None:
        load_training_data(DataSpec(**spec), LANGUAGES, small_tokenizer, 16)

    (tmp_path / "a.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n{'text': 1}\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: not JSON"):
        load(path=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ConfigError, match=r"b\.jsonl, line 1: not JSON"):
        load(path=str(tmp_path / "b.jsonl"))
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match=r"c\.parquet': not a Parquet file"):
        load(path=str(tmp_path / "c.parquet"))
    (tmp_path / "d.csv").write_text("text,language\n")
    with pytest.raises(ConfigError, match=r"d\.csv': unknown kind of file"):
        load(path=str(tmp_path / "d.csv"))
    with pytest.raises(ConfigError, match=r"e\.jsonl': no such file"):
        load(path=str(tmp_path / "e.jsonl"))
    (tmp_path / "set").mkdir()
    write_json_lines(tmp_path / "set/train.jsonl", [GOOD])
    with pytest.raises(ConfigError, match=r"data\.split = 'trian'"):
        load(dataset=str(tmp_path / "set"), split="trian")
    both = [write_json_lines(tmp_path / "t.jsonl", [TOKENS]), write_json_lines(tmp_path / "u.jsonl", [GOOD])]
    with pytest.raises(ConfigError, match="some files are text and some are tokenised"):
        load(path=both)
    with pytest.raises(ConfigError, match="is text, which needs a tokenizer"):
        load_training_data(DataSpec(path=both[1]), LANGUAGES)


def test_the_section_is_checked() -> None:
    assert DataSpec.from_mapping({"path": "x.jsonl", "text_column": "body"}).text_column == "body"
    with pytest.raises(ConfigError, match=r'data\.text_colum: unknown; did you mean "text_column"\?'):
        DataSpec.from_mapping({"path": "x.jsonl", "text_colum": "body"})
    with pytest.raises(ConfigError, match="expected exactly one of the two"):
        DataSpec.from_mapping({})
    with pytest.raises(ConfigError, match="expected exactly one of the two"):
        DataSpec(path="x.jsonl", dataset="y")
