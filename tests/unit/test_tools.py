"""What training tools are told: the section of their files, and rows that keep their language through a preparation
that drops columns and rows. The tools themselves are run by benchmarks/integrations.py."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import transformers
from datasets import Dataset, concatenate_datasets
from draw import SEED

from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.integrations.language_batches import prepared_apart
from bucketmoo_ds.integrations.tool_settings import ToolSettings

LANGUAGES = ["de", "fr", "en"]


def rows(column: bool = True, count: int = 60) -> Dataset:
    """A text says its language, for the test."""
    draw = random.Random(SEED)
    told = [draw.choice(LANGUAGES) for _ in range(count)]
    table: dict[str, Any] = {"text": [f"{name} {number}" for number, name in enumerate(told)]}
    return Dataset.from_dict(table | ({"language": told} if column else {}))


def tokenize(part: Dataset) -> Dataset:
    """Drops every third row, makes two of each other one, in another order, and keeps no column."""

    def of_rows(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        kept = [text for text in batch["text"] if int(text.split()[1]) % 3]
        return {"piece": [text + half for text in reversed(kept) for half in "ab"]}

    return part.map(of_rows, batched=True, remove_columns=part.column_names)


def test_every_piece_of_a_row_keeps_its_language() -> None:
    data = rows()
    prepared = prepared_apart(data, ToolSettings({"languages": LANGUAGES}).column, tokenize)
    assert sorted(prepared["piece"]) == sorted(tokenize(data)["piece"])
    assert [piece.split()[0] for piece in prepared["piece"]] == list(prepared["language"])


def test_a_data_set_of_one_language_needs_no_column() -> None:
    column = ToolSettings({"languages": LANGUAGES}).column
    prepared = prepared_apart(rows(column=False), column, tokenize, language="French")
    assert set(prepared["language"]) == {"fr"}
    with pytest.raises(ConfigError, match=r'data set there has no column "language" \(it has text\)'):
        prepared_apart(rows(column=False), column, tokenize, name="there")
    with pytest.raises(LanguageError, match="ko"):
        prepared_apart(rows(column=False), column, tokenize, language="ko")


def test_the_section_has_settings_and_what_the_trainer_takes() -> None:
    settings = ToolSettings({"languages": LANGUAGES, "aggregator": "cagrad", "sampler": {"temperature": 2.0}})
    assert settings.trainer_arguments == {"moo": settings.config, "sampler": {"temperature": 2.0}}
    assert settings.config.aggregator == "cagrad"
    with pytest.raises(ConfigError, match="no such section"):
        ToolSettings(None)
    with pytest.raises(ConfigError, match="temperature: unknown"):
        ToolSettings({"languages": LANGUAGES, "temperature": 2.0})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """axolotl's plugin over stand-ins for the parts of axolotl that it touches."""

    def get_dataset_wrapper(*, dataset_config: Any, dataset: Any) -> tuple[Any, str]:
        return tokenize(dataset), "prompter"

    def load_datasets(*, cfg: Any) -> Any:
        sft = modules["axolotl.utils.data.sft"]
        return concatenate_datasets(
            [sft.get_dataset_wrapper(dataset_config=each, dataset=each["rows"])[0] for each in cfg["datasets"]]
        )

    parts: dict[str, dict[str, Any]] = {
        "axolotl.common.const": {"DEFAULT_DATASET_PREPARED_PATH": "prepared"},
        "axolotl.common.datasets": {"load_datasets": load_datasets},
        "axolotl.core.trainers.base": {"AxolotlTrainer": transformers.Trainer},
        "axolotl.integrations.base": {"BasePlugin": object, "PluginManager": object},
        "axolotl.utils.data.sft": {"get_dataset_wrapper": get_dataset_wrapper},
    }
    modules: dict[str, Any] = {}
    for name, contents in parts.items():
        for end in [at for at, letter in enumerate(name) if letter == "."] + [len(name)]:
            modules.setdefault(name[:end], ModuleType(name[:end]))
        vars(modules[name]).update(contents)
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "bucketmoo_ds.integrations.axolotl", raising=False)
    import bucketmoo_ds.integrations.axolotl as ours

    yield ours
    del sys.modules["bucketmoo_ds.integrations.axolotl"]


def yaml(ours: Any, **more: Any) -> dict[str, Any]:
    return {"trainer_cls": ours.TRAINER, "bucket_moo": {"languages": LANGUAGES}, **more}


def test_axolotl_keeps_the_language_of_an_entry_and_of_a_row(plugin: Any) -> None:
    entries: list[dict[str, Any]] = [{"path": "a", "language": "en"}, {"path": "b"}]
    cfg = yaml(plugin, datasets=entries, dataset_prepared_path="there")
    made = plugin.BucketMOOPlugin()
    made.register(cfg)
    # As the schema leaves them.
    cfg["datasets"] = [{"path": "a", "rows": rows(column=False)}, {"path": "b", "rows": rows()}]
    found = made.load_datasets(cfg)
    half = len(tokenize(rows()))
    assert set(found["language"][:half]) == {"en"}
    assert [piece.split()[0] for piece in found["piece"][half:]] == list(found["language"][half:])
    assert cfg["dataset_prepared_path"].startswith("there/bucket_moo-")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainer_cls": None}, "trainer_cls: expected bucketmoo_ds"),
        ({"bucket_moo": None}, "no such section"),
        ({"sample_packing": True}, "a pack would mix languages"),
        ({"curriculum_sampling": True}, 'take mode: "mixed"'),
        ({"rl": "dpo"}, "rl: preferences"),
        ({"context_parallel_size": 2}, "context_parallel_size: each rank"),
    ],
)
def test_axolotl_is_refused_what_would_average(plugin: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plugin.BucketMOOPlugin().register(yaml(plugin) | change)


def test_another_trainer_than_ours_stops_axolotl(plugin: Any) -> None:
    with pytest.raises(RuntimeError, match="has built object, which would average"):
        plugin.BucketMOOPlugin().post_trainer_create(yaml(plugin), object())
