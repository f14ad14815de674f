"""The file of `bucketmoo train`: sampler options have the sampler's names, values and errors."""

from __future__ import annotations

import json

import pytest
import yaml

from bucketmoo_ds.apps.training.settings import read_settings
from bucketmoo_ds.errors import ConfigError

SETTINGS = {
    "output": "out",
    "model": {"name": "model"},
    "data": {"path": "text"},
    "training": {"steps": 1, "sequence_length": 8, "learning_rate": 0.1},
    "deepspeed": {"bucket_moo": {"languages": ["de", "fr"]}},
}


def read(folder, repeat, suffix=".json"):
    file = folder / f"train{suffix}"
    settings = SETTINGS | {"training": SETTINGS["training"] | {"repeat": repeat}}
    file.write_text(json.dumps(settings) if suffix == ".json" else yaml.safe_dump(settings))
    return read_settings(file).training.repeat


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("repeat", [1, 3, "auto", {"fr": 4}, {"de": "auto", "fr": 2}])
def test_repeat_is_read(tmp_path, repeat, suffix):
    assert read(tmp_path, repeat, suffix) == repeat


@pytest.mark.parametrize(
    ("repeat", "message"),
    [
        (0, 'training.repeat = 0: expected a whole number, 1 or more, or "auto"'),
        (None, "training.repeat = None"),
        ("often", "training.repeat = 'often'"),
        ({"fr": 0.5}, "training.repeat.fr = 0.5"),
        ({"fra": 2}, 'training.repeat: "fra" is no language of .*; did you mean "fr"'),
    ],
)
def test_a_wrong_repeat_is_named(tmp_path, repeat, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, repeat)
