"""Settings that mean nothing in mixed mode, and other adapters in it, are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import bucketmoo_ds
from bucketmoo_ds.errors import ConfigError


@pytest.mark.parametrize("setting", [{"exchange": "flat"}, {"ranks_per_node": 2}, {"row_storage": "host"}])
def test_settings_of_rows_are_refused(setting: dict[str, Any]) -> None:
    config = bucketmoo_ds.BucketMOOConfig(languages=["de", "fr"], mode="mixed", **setting)
    with pytest.raises(ConfigError, match=f"bucket_moo.{next(iter(setting))} = .*mixed"):
        bucketmoo_ds.mixed.register(nn.Linear(3, 3), config)


def test_other_adapters_name_the_way_out() -> None:
    config = bucketmoo_ds.BucketMOOConfig(languages=["de", "fr"], mode="mixed")
    with pytest.raises(ConfigError, match=r"bucketmoo_ds\.mixed\.register\(model, config\)"):
        bucketmoo_ds.single.register(nn.Linear(3, 3), config, micro_steps=1)
