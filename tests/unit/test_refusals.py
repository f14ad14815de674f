"""Every setting and engine that cannot be combined with bucket_moo is refused, with its reason and the way out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from bucketmoo_ds.adapters.deepspeed import read_section
from bucketmoo_ds.adapters.deepspeed.attach import STAGES
from bucketmoo_ds.adapters.deepspeed.checks import (
    REFUSALS,
    refuse_engine,
    refuse_gathers,
    refuse_loss_scale,
    refuse_settings,
)
from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine
from bucketmoo_ds.adapters.deepspeed.seams import BEYOND, OLDEST, SEAMS, check_seams, expected
from bucketmoo_ds.adapters.deepspeed.zero0 import ReplicatedEngine
from bucketmoo_ds.adapters.deepspeed.zero3 import BucketMOOZero3Optimizer
from bucketmoo_ds.adapters.deepspeed.zero12 import BucketMOOZeroOptimizer
from bucketmoo_ds.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
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
    "zero_optimization.contiguous_gradients = false": [
        ({"zero_optimization": {"contiguous_gradients": False}}, "elsewhere; remove it (the default is true)"),
    ],
    "managed_gradient_accumulation = false": [
        ({"managed_gradient_accumulation": False, "gradient_accumulation_steps": 1}, "boundary of a window"),
    ],
    "zero_optimization.zenflow": [
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "ZenFlow replaces the reduction; remove it"),
    ],
    "zero_optimization.zero_quantized_gradients": [
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "added up inside an exchange of their own; remove it",
        ),
    ],
    "zero_optimization.offload_optimizer.super_offload": [
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "SuperOffload replaces the reduction; remove it (offload_optimizer without it works)",
        ),
    ],
    "zero_optimization.ignore_unused_parameters = false with offload_optimizer": [
        (
            {
                "zero_optimization": {
                    "stage": stage,
                    "ignore_unused_parameters": False,
                    "offload_optimizer": {"device": "cpu"},
                }
            },
            "cannot see which ones were unused; remove it (the default is true)",
        )
        for stage in (1, 2)
    ],
    "compile.deepcompile": [({"compile": {"deepcompile": True}}, "DeepCompile replaces the reduction; remove it")],
    "prescale_gradients": [({"prescale_gradients": True}, "part of their per-language mean; remove it")],
    "gradient_predivide_factor": [({"gradient_predivide_factor": 2.0}, "part of their per-language mean; remove it")],
    "gradient_allreduce_op = sum": [
        ({"gradient_allreduce_op": "sum"}, "part of their per-language mean; remove it (the default is mean)"),
    ],
    "fp16.enabled with zero_optimization.stage = 0": [
        (
            {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}},
            "not multiplied the loss by; use stage 1, 2 or 3, or bf16.enabled",
        ),
    ],
    "torch_autocast.dtype = float16": [
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            'a GradScaler of its own, outside of a window\'s overflow check; use "dtype": "bfloat16", or fp16.enabled',
        ),
    ],
    "torch_autocast.enabled with zero_optimization.stage = 3": [
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 3}},
            "gathers parameters in autocast's dtype",
        ),
    ],
}


# Settings that older versions of DeepSpeed lack, and their names in its parsed configuration.
LATER = {
    "managed_gradient_accumulation = false": "managed_gradient_accumulation",
    "gradient_allreduce_op = sum": "gradient_allreduce_op",
}


@pytest.mark.parametrize("setting", [entry[0] for entry in REFUSALS])
def test_every_refused_setting(setting: str) -> None:
    assert setting in TRIGGERS, f"REFUSALS has a new entry, {setting}: give it a JSON that triggers it"
    if setting in LATER and not hasattr(parsed({}), LATER[setting]):
        pytest.skip("this DeepSpeed has no such setting")
    for changes, part in TRIGGERS[setting]:
        with pytest.raises(ConfigError) as caught:
            refuse_settings(parsed(changes), "bucket_moo")
        assert str(caught.value).startswith(f"{setting} cannot be combined with bucket_moo: ")
        assert part in str(caught.value)


def test_no_trigger_is_left_over() -> None:
    assert set(TRIGGERS) == {entry[0] for entry in REFUSALS}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, "sub_group_size": 100}},
        {"zero_optimization": {"stage": 3, "reduce_scatter": False, "stage3_param_persistence_threshold": 0}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"fp16": {"enabled": True}},
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"gradient_clipping": 1.0},
        {"zero_optimization": {"overlap_comm": True, "round_robin_gradients": True, "reduce_bucket_size": 1000}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"ignore_unused_parameters": False}},
        {"zero_optimization": {"ignore_unused_parameters": False, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"ignore_unused_parameters": True, "offload_optimizer": {"device": "cpu"}}},
        {"fp16": {"enabled": False}},
        {"gradient_predivide_factor": 1.0},
        {"torch_autocast": {"enabled": False}},
        {"communication_data_type": "fp32"},
    ],
)
def test_what_works_is_not_refused(changes: dict[str, Any]) -> None:
    refuse_settings(parsed(changes), "bucket_moo")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("deepspeed_*.json")), ids=lambda path: path.stem)
def test_ready_files_are_accepted(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert read_section(raw) is not None
    refuse_settings(DeepSpeedConfig(raw), "bucket_moo")
    assert f"zero{raw['zero_optimization']['stage']}" in path.stem


class FakeOptimizer:
    pass


class OfAnotherStage(FakeOptimizer):
    """As SuperOffloadOptimizer_Stage3 is to DeepSpeedZeroOptimizer_Stage3: it inherits, and reduces otherwise."""


class FakeEngine:
    def __init__(self, **changes: Any) -> None:
        self.optimizer: Any = FakeOptimizer()
        self.module: torch.nn.Module = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))
        self.has_moe_layers = False
        self.sequence_parallel_size = 1
        self.mpu = None
        self.__dict__.update(changes)


KNOWN: dict[type, str] = {FakeOptimizer: "a stage", torch.optim.Optimizer: "no stage"}


def muon() -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].weight.use_muon = True  # type: ignore[assignment]
    return module


def one_bit() -> torch.optim.Optimizer:
    """As DeepSpeed's OnebitAdam, which later versions have no more."""
    kind = type("OnebitAdam", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.fp16.onebit.adam"})
    return kind([torch.nn.Parameter(torch.randn(2))], lr=0.1)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.randn(2))], lr=0.1)


def test_what_the_adapter_knows_is_taken() -> None:
    assert refuse_engine(FakeEngine(), FakeEngine, KNOWN) == "a stage"
    assert refuse_engine(FakeEngine(optimizer=sgd()), FakeEngine, KNOWN) == "no stage"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"has_moe_layers": True}, "mixture-of-experts layers"),
        ({"sequence_parallel_size": 2}, "sequence parallelism"),
        ({"mpu": SimpleNamespace()}, "tensor or pipeline parallelism (mpu)"),
        ({"module": torch.nn.Sequential(torch.nn.Embedding(3, 2, sparse=True))}, "embeddings with sparse=True"),
        ({"optimizer": one_bit()}, "1-bit optimizers"),
        ({"module": muon()}, "the Muon optimizer"),
    ],
)
def test_every_refused_engine(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_engine(FakeEngine(**changes), FakeEngine, KNOWN)
    assert str(caught.value) == f"bucket_moo cannot be combined with {what}: gradients are then reduced another way"


@pytest.mark.parametrize("scale", [None, 1.0, 65536.0])
def test_a_loss_scale_that_nothing_multiplies_by_is_refused(scale: float | None) -> None:
    refused = pytest.raises(ConfigError, match=r"SimpleNamespace of DeepSpeed before 0[.]18[.]6 divides gradients")
    with refused if scale == 65536.0 else contextlib.nullcontext():
        refuse_loss_scale(SimpleNamespace(loss_scale=scale))


def waits_for_the_last(launch_handles: list[Any]) -> None:
    launch_handles[-1].wait()


def waits_for_all(launch_handles: list[Any]) -> None:
    for handle in launch_handles:
        handle.wait()


@pytest.mark.parametrize("gathers", [waits_for_the_last, waits_for_all])
@pytest.mark.parametrize(
    ("stage", "backend", "ranks"), [(3, "gloo", 2), (3, "nccl", 2), (3, "gloo", 1), (2, "gloo", 2)]
)
def test_gathers_that_nothing_waits_for_are_refused(
    stage: int, backend: str, ranks: int, gathers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed.zero.Init, "_allgather_params_coalesced", gathers)
    late = gathers is waits_for_the_last and (stage, backend, ranks) == (3, "gloo", 2)
    refused = pytest.raises(ConfigError, match=r"^zero_optimization.stage = 3 over gloo .*; install 0[.]19[.]8 or")
    with refused if late else contextlib.nullcontext():
        refuse_gathers(stage, backend, ranks)


def test_another_engine_is_refused() -> None:
    class PipelineEngine(FakeEngine):
        pass

    with pytest.raises(ConfigError) as caught:
        refuse_engine(PipelineEngine(), FakeEngine, KNOWN)
    assert str(caught.value).startswith("bucket_moo works with FakeEngine, DeepSpeed built PipelineEngine (pipeline")
    assert "use a plain module" in str(caught.value)


@pytest.mark.parametrize("optimizer", [None, OfAnotherStage(), BF16_Optimizer.__new__(BF16_Optimizer)])
def test_another_optimizer_is_refused(optimizer: object) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_engine(FakeEngine(optimizer=optimizer), FakeEngine, KNOWN)
    assert f"does not know DeepSpeed's {type(optimizer).__name__}; it works with one of " in str(caught.value)
    assert "pass an optimizer, and use ZeRO stage 0, 1, 2 or 3" in str(caught.value)


def test_every_stage_is_known() -> None:
    assert {DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, torch.optim.Optimizer} <= set(STAGES)
    assert BF16_Optimizer not in STAGES
    assert SuperOffloadOptimizer_Stage3 not in STAGES


OWNERS: dict[str, type] = {
    "engine": DeepSpeedEngine,
    "ZeRO-1/2": DeepSpeedZeroOptimizer,
    "ZeRO-3": DeepSpeedZeroOptimizer_Stage3,
}


def test_seams_of_the_installed_deepspeed() -> None:
    assert list(OWNERS) == list(SEAMS)
    check_seams(deepspeed.__version__, *OWNERS.values())


@pytest.mark.parametrize(("which", "name"), [(which, name) for which, methods in SEAMS.items() for name in methods])
@pytest.mark.parametrize("gone", [True, False])
def test_every_seam_is_checked(which: str, name: str, gone: bool) -> None:
    def other(self: object, something: object, new: object) -> None: ...

    wanted = expected(SEAMS[which][name], deepspeed.__version__)
    if gone and wanted is None:
        pytest.skip(f"DeepSpeed {deepspeed.__version__} has no {name}")
    stand_in = type(OWNERS[which].__name__, (OWNERS[which],), {name: None if gone else other})
    with pytest.raises(ConfigError) as caught:
        check_seams(deepspeed.__version__, *(OWNERS | {which: stand_in}).values())
    message = str(caught.value)
    found = "None" if gone else repr(("self", "something", "new"))
    assert f"{stand_in.__name__}.{name} of DeepSpeed {deepspeed.__version__} has parameters {found}" in message
    assert f"expected {wanted}" in message
    assert f'install "deepspeed>={OLDEST},<{BEYOND}"' in message


@pytest.mark.parametrize("version", ["0.16.9", "0.17.6", "0.18.3", "0.20.0", "1.0"])
def test_versions_beyond_the_table_are_refused(version: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_seams(version, *OWNERS.values())
    expected_start = f"bucket_moo works with DeepSpeed {OLDEST} and later, before {BEYOND}; {version} is installed"
    assert str(caught.value).startswith(expected_start)


def test_forms_are_found_by_version() -> None:
    forms = {"0.18.4": None, "0.18.10": ("self",), "0.19.8": ("self", "new")}
    versions = ("0.18.4", "0.18.9+abc", "0.18.10", "0.19.7", "0.19.8.dev1", "0.19.12")
    assert [expected(forms, version) for version in versions] == [
        *(None, None, ("self",), ("self",), ("self", "new"), ("self", "new"))
    ]


@pytest.mark.parametrize(
    ("extended", "of"),
    [
        (BucketMOOEngine, "engine"),
        (ReplicatedEngine, "engine"),
        (BucketMOOZeroOptimizer, "ZeRO-1/2"),
        (BucketMOOZero3Optimizer, "ZeRO-3"),
    ],
)
def test_everything_that_is_overridden_is_a_seam(extended: type, of: str) -> None:
    """What an adapter overrides without checking it would be lost silently when DeepSpeed renames it."""
    # Documented for users.
    public = {"forward", "zero_grad", "coalesce_grad_reduction", "save_checkpoint", "load_checkpoint"}
    overridden = {name for name in vars(extended) if hasattr(OWNERS[of], name) and not name.startswith("__")}
    assert overridden - public <= set(SEAMS[of])


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
