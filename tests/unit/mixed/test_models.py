"""Models of transformers as it writes them: experts and routers, checkpointing, scaled embeddings, decoders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.configuration_bart import BartConfig
from transformers.models.bart.modeling_bart import BartForConditionalGeneration
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertForSequenceClassification
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, load_balancing_loss_func
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from unit.mixed.language_models import LENGTH, MOE, SMALL, WORDS, check
from unit.mixed.stack import IGNORED


def gpt2() -> nn.Module:
    """With dropout."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_and_checkpointing(reentrant: bool | None) -> None:
    model = gpt2()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    check(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),
        lambda: BertForMaskedLM(BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})),
    ],
)
def test_token_models(make: Callable[[], nn.Module]) -> None:
    """Norms by head, embeddings that scale, heads that hold a bias which another module uses."""
    check(make())


def test_one_label_for_each_sequence() -> None:
    config = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    model = BertForSequenceClassification(BertConfig(**config, num_labels=3))
    check(model, labels=lambda generator: torch.randint(3, (8,), generator=generator))


def bart() -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    places = {"max_position_embeddings": LENGTH, "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=WORDS, d_model=8, **sizes, **heads, **places))


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, **sizes))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    return model


@pytest.mark.parametrize("make", [bart, t5])
def test_encoders_with_decoders(make: Callable[[], nn.Module]) -> None:
    """What the decoder reads and writes is of another length; its rows are of the language of their sequence."""
    check(make(), labels=lambda generator: torch.randint(3, WORDS, (8, LENGTH - 2), generator=generator))


def with_balance(model: nn.Module, inputs: dict[str, Tensor], there: Tensor, targets: Tensor) -> Tensor:
    """The loss that balances experts is of all tokens together; a language's part of its gradient is what comes through
    the language's own tokens. It counts as the loss of the language's target tokens, of which it has a share."""
    output = model(**inputs)
    config, tokens = model.config, there.repeat_interleave(LENGTH).unsqueeze(1)
    logits = tuple(torch.where(tokens, each, each.detach()) for each in output.router_logits)
    number = getattr(config, "num_local_experts", None) or config.num_experts
    balance = load_balancing_loss_func(logits, number, config.num_experts_per_tok)
    of_all, own = ((each[:, 1:] != IGNORED).sum() for each in (targets, inputs["labels"]))
    return output.loss + config.router_aux_loss_coef * (balance * of_all / own - output.aux_loss)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **more: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**MOE, **more, moe_intermediate_size=8, num_experts=4, head_dim=8)
        ),
        lambda **more: MixtralForCausalLM(MixtralConfig(**MOE, **more, num_local_experts=4)),
    ],
)
def test_experts(make: Callable[..., nn.Module], implementation: str, balanced: bool) -> None:
    model = make(output_router_logits=balanced, router_aux_loss_coef=0.1)
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("transformers 4 hands an expert gathered rows, which are refused by name")
    model.set_experts_implementation(implementation)
    check(model, **({"loss_of": with_balance} if balanced else {}))
