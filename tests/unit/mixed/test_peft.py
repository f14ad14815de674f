"""Adapters as peft writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from unit.mixed import stack
from unit.mixed.language_models import LENGTH, SMALL, WORDS, check
from unit.mixed.stack import IGNORED, LANGUAGES
from unit.mixed.test_models import gpt2

from bucketmoo_ds.data.batch import shifts_labels
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.integrations.language_losses import TokenLosses

peft = pytest.importorskip("peft")
LINEAR = ["q_proj", "v_proj", "down_proj"]
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


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


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
        peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
        peft.PrefixTuningConfig(**PROMPT),
        peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=5),
        peft.PrefixTuningConfig(**PROMPT | {"num_virtual_tokens": LENGTH}),  # as many as the sequence has
    ],
)
def test_others_of_llama(config: Any) -> None:
    check(peft.get_peft_model(llama(), config))


def test_qlora() -> None:
    """4-bit layers compute, and are not trained."""
    bnb = pytest.importorskip("bitsandbytes")
    model: Any = llama()
    for layer in model.get_submodule("model.layers"):
        for name in ("q_proj", "v_proj"):
            plain = getattr(layer.self_attn, name)
            made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer.self_attn, name, made.to("cpu"))
    model.is_loaded_in_4bit = True
    model = adapted(model, target_modules=LINEAR)
    assert type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")).__name__ == "Linear4bit"
    check(model)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
def test_the_first_label_behind_virtual_tokens(kind: Any) -> None:
    """It is a target where virtual tokens stand before it in the sequence, and not where they are cached keys."""
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), kind(**PROMPT))
    read = kind is not peft.PrefixTuningConfig
    assert shifts_labels(model) is not read
    assert shifts_labels(nn.ModuleList([model])) is not read  # as in a wrapper
    ids = torch.randint(3, WORDS, (4, LENGTH))
    labels = torch.where(torch.rand(ids.shape) < 0.3, IGNORED, ids)
    labels[:2, 0] = ids[:2, 0]
    listener = TokenLosses(model, 2, None)
    listener.expect({"labels": labels}, torch.tensor([0, 1, 1, 0]))
    loss = model(input_ids=ids, labels=labels).loss
    found = listener.take()
    assert found is not None
    sums, counts = found
    targets = (labels if read else labels[:, 1:]) != IGNORED
    assert int(counts.sum()) == int(targets.sum())
    # Of float32: a mean of some twenty numbers, each rounded by 2^-24.
    assert functional.l1_loss(sums.sum() / counts.sum(), loss.detach().double()) < 1e-6


def by_token(model: nn.Module, **inputs: Tensor) -> None:
    session = stack.register(model, shift_labels=None)
    ids = torch.randint(3, WORDS, (4, LENGTH))
    languages = (torch.arange(4) % len(LANGUAGES)).unsqueeze(1).expand(ids.shape)
    model(input_ids=ids, labels=ids, language=languages, **inputs).loss.backward()
    session.end_window()


def test_languages_by_token_beside_virtual_tokens() -> None:
    """Which would be the language of a virtual token?"""
    for number in (3, LENGTH):
        config = peft.PrefixTuningConfig(**PROMPT | {"num_virtual_tokens": number})
        with pytest.raises(LanguageError, match=r"given by token, .*virtual tokens \(peft\).*; give one for each seq"):
            by_token(peft.get_peft_model(llama(), config))
    by_token(adapted(llama(), target_modules=LINEAR))


def test_what_is_refused() -> None:
    for kind, name in ((peft.PromptTuningConfig, "embedding"), (peft.PromptEncoderConfig, "embedding")):
        with pytest.raises(ConfigError, match=rf'"prompt_encoder\.default\.{name}" .*in a prompt that all .*prefix'):
            check(peft.get_peft_model(llama(), kind(**PROMPT)))
    with pytest.raises(ConfigError, match=r"lora_magnitude_vector\.default. \(DoraEmbeddingLayer\)"):
        check(adapted(llama(), target_modules=["embed_tokens"], use_dora=True))
    with pytest.raises(ConfigError, match=r"trainable_tokens_delta. \(ParameterDict\)"):
        check(adapted(llama(), target_modules=LINEAR, trainable_token_indices=[1, 2]))
