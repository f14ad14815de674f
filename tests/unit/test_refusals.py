"""Every setting and engine that cannot be combined with bucket_moo is refused, with its reason and the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from bucketmoo_ds.adapters.deepspeed import read_section
from bucketmoo_ds.adapters.deepspeed.checks import REFUSALS, SEAMS, check_seams, refuse_engine, refuse_settings
from bucketmoo_ds.errors import ConfigError

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
}


def parsed(changes: dict[str, Any]) -> DeepSpeedConfig:
    merged = dict(GOOD)
    for key, value in changes.items():
        merged[key] = GOOD.get(key, {}) | value if isinstance(value, dict) else value
    return DeepSpeedConfig(merged)


# For each entry of REFUSALS: a JSON that triggers it, and a part of its message.
TRIGGERS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "zero_optimization.stage": [
        ({"zero_optimization": {"stage": 0}}, 'set "stage": 2 (or 1)'),
        ({"zero_optimization": {"stage": 3}}, "inside the reduction of ZeRO-1 and ZeRO-2"),
    ],
    "zero_optimization.offload_optimizer": [
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload moves away; remove it"),
    ],
    "zero_optimization.contiguous_gradients = false": [
        ({"zero_optimization": {"contiguous_gradients": False}}, "no gradient hooks; remove it (the default is true)"),
    ],
    "managed_gradient_accumulation = false": [
        ({"managed_gradient_accumulation": False, "gradient_accumulation_steps": 1}, "boundary of a window"),
    ],
    "zero_optimization.zenflow": [
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "ZenFlow replaces the reduction; remove it"),
    ],
    "compile.deepcompile": [({"compile": {"deepcompile": True}}, "DeepCompile replaces the reduction; remove it")],
    "prescale_gradients": [({"prescale_gradients": True}, "part of their per-language mean; remove it")],
    "gradient_predivide_factor": [({"gradient_predivide_factor": 2.0}, "part of their per-language mean; remove it")],
    "fp16.enabled": [({"fp16": {"enabled": True}}, 'use "bf16": {"enabled": true}')],
    "torch_autocast.enabled": [
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "several dtypes are then exchanged apart"),
    ],
}


@pytest.mark.parametrize("setting", [entry[0] for entry in REFUSALS])
def test_every_refused_setting(setting: str) -> None:
    assert setting in TRIGGERS, f"REFUSALS has a new entry, {setting}: give it a JSON that triggers it"
    for changes, expected in TRIGGERS[setting]:
        with pytest.raises(ConfigError) as caught:
            refuse_settings(parsed(changes), "bucket_moo")
        assert str(caught.value).startswith(f"{setting} cannot be combined with bucket_moo: ")
        assert expected in str(caught.value)


def test_no_trigger_is_left_over() -> None:
    assert set(TRIGGERS) == {entry[0] for entry in REFUSALS}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_optimization": {"stage": 1}},
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"gradient_clipping": 1.0},
        {"zero_optimization": {"overlap_comm": True, "round_robin_gradients": True, "reduce_bucket_size": 1000}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {"fp16": {"enabled": False}},
        {"gradient_predivide_factor": 1.0},
        {"torch_autocast": {"enabled": False}},
        {"communication_data_type": "fp32"},
    ],
)
def test_what_works_is_not_refused(changes: dict[str, Any]) -> None:
    refuse_settings(parsed(changes), "bucket_moo")


class FakeOptimizer:
    def __init__(self, **changes: Any) -> None:
        self.gradient_average = True
        self.bit16_groups = [[torch.nn.Parameter(torch.randn(2))]]
        self.__dict__.update(changes)


class FakeEngine:
    def __init__(self, **changes: Any) -> None:
        self.optimizer: Any = FakeOptimizer()
        self.module: torch.nn.Module = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))
        self.has_moe_layers = False
        self.sequence_parallel_size = 1
        self.mpu = None
        self.__dict__.update(changes)


def muon() -> FakeOptimizer:
    parameter = torch.nn.Parameter(torch.randn(2))
    parameter.use_muon = True  # type: ignore[attr-defined]
    return FakeOptimizer(bit16_groups=[[torch.nn.Parameter(torch.randn(2))], [parameter]])


def test_the_engine_that_the_adapter_extends_is_taken() -> None:
    refuse_engine(FakeEngine(), FakeOptimizer, FakeEngine)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"has_moe_layers": True}, "mixture-of-experts layers"),
        ({"sequence_parallel_size": 2}, "sequence parallelism"),
        ({"mpu": SimpleNamespace()}, "tensor or pipeline parallelism (mpu)"),
        ({"optimizer": FakeOptimizer(gradient_average=False)}, "gradient_allreduce_op = sum"),
        ({"module": torch.nn.Sequential(torch.nn.Embedding(3, 2, sparse=True))}, "embeddings with sparse=True"),
        ({"optimizer": muon()}, "the Muon optimizer"),
    ],
)
def test_every_refused_engine(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_engine(FakeEngine(**changes), FakeOptimizer, FakeEngine)
    assert str(caught.value) == f"bucket_moo cannot be combined with {what}: gradients are then reduced another way"


def test_another_engine_is_refused() -> None:
    class PipelineEngine(FakeEngine):
        pass

    with pytest.raises(ConfigError) as caught:
        refuse_engine(PipelineEngine(), FakeOptimizer, FakeEngine)
    assert str(caught.value).startswith("bucket_moo works with FakeEngine, DeepSpeed built PipelineEngine (pipeline")
    assert "use a plain module" in str(caught.value)


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD([torch.nn.Parameter(torch.randn(2))], lr=0.1)])
def test_another_optimizer_is_refused(optimizer: object) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_engine(FakeEngine(optimizer=optimizer), FakeOptimizer, FakeEngine)
    assert f"this configuration built {type(optimizer).__name__}" in str(caught.value)
    assert "pass an optimizer, and use ZeRO stage 1 or 2" in str(caught.value)


def test_seams_of_the_installed_deepspeed() -> None:
    check_seams(DeepSpeedEngine, DeepSpeedZeroOptimizer)


def stand_in(owner: type, changed: dict[str, Any]) -> type:
    return type(owner.__name__, (owner,), changed)


@pytest.mark.parametrize(("which", "name"), [(which, name) for which, methods in SEAMS.items() for name in methods])
@pytest.mark.parametrize("gone", [True, False])
def test_every_seam_is_checked(which: str, name: str, gone: bool) -> None:
    def other(self: object, something: object, new: object) -> None: ...

    changed = {name: None if gone else other}
    engine = stand_in(DeepSpeedEngine, changed) if which == "engine" else DeepSpeedEngine
    optimizer = stand_in(DeepSpeedZeroOptimizer, changed) if which == "optimizer" else DeepSpeedZeroOptimizer
    with pytest.raises(ConfigError) as caught:
        check_seams(engine, optimizer)
    message = str(caught.value)
    assert f".{name} has parameters {'None' if gone else repr(('self', 'something', 'new'))}" in message
    assert f"expected {SEAMS[which][name]}" in message
    assert "install a version that bucketmoo_ds supports (0.19.8 is tested)" in message


def test_read_section() -> None:
    good = {"languages": ["de", "fr"]}
    assert read_section(GOOD) is None
    assert read_section(GOOD | {"bucket_moo": good | {"enabled": False}}) is None
    config = read_section(GOOD | {"bucket_moo": good})
    assert config is not None
    assert config.languages == ("de", "fr")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"bucketmoo": {}}, '"bucketmoo": not a DeepSpeed setting; did you mean "bucket_moo"?'),
        ({"bucket_moo": {"languages": ["de"], "aggregator": "mdga"}}, 'did you mean "mgda"?'),
        ({"bucket_moo": {"languages": ["de"], "aggregator_options": {"c": 1}}}, "bucket_moo.aggregator_options: "),
        ({"bucket_moo": {"languages": ["de"], "backend": "none"}}, 'bucket_moo.backend = "none": unknown'),
        ({"bucket_moo": []}, "bucket_moo = []: expected an object"),
    ],
)
def test_read_section_refuses(raw: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUCKETMOO_BACKEND", raising=False)
    with pytest.raises(ConfigError) as caught:
        read_section(GOOD | raw)
    assert expected in str(caught.value)
