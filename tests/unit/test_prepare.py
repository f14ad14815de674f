"""What `bm.prepare` refuses, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bucketmoo_ds as bm
from bucketmoo_ds.errors import ConfigError

accelerate = pytest.importorskip("accelerate")
CONFIG = bm.BucketMOOConfig(languages=["de", "fr"])
ROWS = [{"language": name, "x": torch.ones(2)} for name in ("de", "fr") * 8]


@pytest.fixture
def accelerator() -> Iterator[Any]:
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState, accelerate.state.GradientState):
        state._reset_state()


def loader(micro_steps: int = 2, **settings: Any) -> DataLoader[Any]:
    settings = {"config": CONFIG} | settings
    sampler = bm.LanguageBatchSampler(ROWS, **settings, micro_batch_size=2, micro_steps=micro_steps)
    return DataLoader(ROWS, batch_sampler=sampler)


def prepare(accelerator: Any, loader: DataLoader[Any], *more: Any, config: bm.BucketMOOConfig = CONFIG) -> Any:
    model = nn.Linear(2, 1)
    return bm.prepare(accelerator, model, torch.optim.SGD(model.parameters()), loader, *more, config=config)


def test_batches_of_several_languages(accelerator: Any) -> None:
    with pytest.raises(ConfigError, match=r"come from BatchSampler, which mixes languages; .*mode = \"mixed\""):
        prepare(accelerator, DataLoader(ROWS, batch_size=2))


def test_other_languages_or_windows(accelerator: Any) -> None:
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps = 2, .* micro_steps = 1"):
        prepare(accelerator, loader(micro_steps=1))
    with pytest.raises(ConfigError, match=r"languages = \['fr', 'de'\]"):
        prepare(accelerator, loader(config=None, languages=["fr", "de"]))


def test_two_loaders_or_models(accelerator: Any) -> None:
    with pytest.raises(ConfigError, match=r"2 objects of DataLoader; .* give others to accelerator\.prepare"):
        prepare(accelerator, loader(), loader())
    with pytest.raises(ConfigError, match="2 objects of Module"):
        prepare(accelerator, loader(), nn.Linear(1, 1))


def test_fsdp_that_was_not_built(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP was asked for, and Accelerate has built Linear"):
        prepare(accelerator, loader())


def test_two_sections() -> None:
    """The JSON's and the config's."""
    plugin = SimpleNamespace(deepspeed_config={"bucket_moo": {"languages": ["de", "fr"], "aggregator": "mean"}})
    stub = SimpleNamespace(distributed_type="DEEPSPEED", state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ConfigError, match='another "bucket_moo" than the config'):
        prepare(stub, loader())
