"""Adapters as peft writes them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from unit.mixed.language_models import SMALL, check
from unit.mixed.test_models import gpt2

from bucketmoo_ds.errors import ConfigError

peft = pytest.importorskip("peft")
LINEAR = ["q_proj", "v_proj", "down_proj"]


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=4, **settings))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": LINEAR, "lora_dropout": 0.2},
        {"target_modules": LINEAR, "use_dora": True},
        {"target_modules": [*LINEAR, "embed_tokens"]},
        {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ],
)
def test_lora_of_llama(settings: dict[str, Any]) -> None:
    check(adapted(llama(), **settings))


@pytest.mark.parametrize("dora", [False, True])
def test_lora_of_gpt2(dora: bool) -> None:
    """Its linear layers lie the other way round."""
    check(adapted(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_magnitude_vector\.default. \(DoraEmbeddingLayer\)"):
        check(adapted(llama(), target_modules=["embed_tokens"], use_dora=True))
    with pytest.raises(ConfigError, match=r"trainable_tokens_delta. \(ParameterDict\)"):
        check(adapted(llama(), target_modules=LINEAR, trainable_token_indices=[1, 2]))
