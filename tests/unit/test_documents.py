"""What tells documents apart is followed exactly where the models of transformers follow it: one token of the first
document is changed, and the logits of the second move or do not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
    XGLMForCausalLM,
)

from bucketmoo_ds.data.attention import Attention
from bucketmoo_ds.data.documents import documents_of

LENGTH, FIRST = 8, 3  # tokens of a sequence and of its first document
DOCUMENTS = torch.tensor([0] * FIRST + [1] * (LENGTH - FIRST))
POSITIONS = torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)])
BOUNDS = torch.tensor([0, FIRST, LENGTH], dtype=torch.int32)
BLOCKS = DOCUMENTS.unsqueeze(1) == DOCUMENTS
HIDES = torch.zeros(LENGTH, LENGTH).masked_fill(~BLOCKS, torch.finfo(torch.float32).min)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE = _SMALL | {"intermediate_size": 32}
MODELS = {
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**_WIDE, **changes)),
    "mistral": lambda **changes: MistralForCausalLM(MistralConfig(**_WIDE, num_key_value_heads=2, **changes)),
    "gpt2": lambda **changes: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **changes)),
    "xglm": lambda **changes: XGLMForCausalLM(
        XGLMConfig(vocab_size=64, d_model=32, ffn_dim=32, num_layers=2, attention_heads=2, **changes)
    ),
    "bert": lambda **changes: BertForMaskedLM(BertConfig(**_WIDE, **changes)),
}


def _four(mask: Tensor, batch: int) -> Tensor:
    return mask.expand(batch, 1, LENGTH, LENGTH)


def _inputs(form: str, batch: int) -> dict[str, Any]:
    rows = {"position_ids": POSITIONS.expand(batch, LENGTH), "seq_idx": DOCUMENTS.expand(batch, LENGTH).int()}
    causal = torch.where(CAUSAL, HIDES, torch.finfo(torch.float32).min)
    lengths = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 5, "max_length_k": 5}
    return {
        "positions": {"position_ids": rows["position_ids"]},
        "positions of one row": {"position_ids": POSITIONS.unsqueeze(0)},
        "positions, no cache": {"position_ids": rows["position_ids"], "use_cache": False},
        "positions and padding": rows | {"attention_mask": torch.ones(batch, LENGTH, dtype=torch.long)},
        "positions that go on": {"position_ids": torch.arange(LENGTH).expand(batch, LENGTH) + 3},
        "hides": {"attention_mask": _four(causal, batch)},
        "blocks": {"attention_mask": _four(BLOCKS & CAUSAL, batch)},
        "bounds": lengths,
        "numbers": {"seq_idx": rows["seq_idx"]},
        "nothing": {},
    }[form]


FORMS = [
    "positions", "positions of one row", "positions, no cache", "positions and padding", "positions that go on",
    "hides", "blocks", "bounds", "numbers", "nothing",
]  # fmt: skip


def made(name: str, attention: str, use_cache: bool = False) -> nn.Module:
    """The model in evaluation mode: dropout would move all logits."""
    torch.manual_seed(0)
    return MODELS[name](attn_implementation=attention, use_cache=use_cache).eval()


def keeps_apart(model: nn.Module, inputs: dict[str, Any], batch: int) -> bool:
    tokens = torch.randint(5, 60, (batch, LENGTH))
    changed = tokens.clone()
    changed[:, 1] = (tokens[:, 1] + 7) % 60
    # XGLM of transformers 4 adds to the positions in place.
    before, after = (
        model(input_ids=each, **{name: _own(value) for name, value in inputs.items()}).logits
        for each in (tokens, changed)
    )
    assert not torch.equal(before[:, :FIRST], after[:, :FIRST])
    return torch.equal(before[:, FIRST:], after[:, FIRST:])


def _own(value: Any) -> Any:
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def told_apart(model: nn.Module | None, inputs: dict[str, Any], batch: int) -> tuple[bool, str]:
    found = documents_of(inputs, (batch, LENGTH), torch.device("cpu"), Attention(model))
    apart = DOCUMENTS + 2 * torch.arange(batch).unsqueeze(1)
    together = torch.arange(batch).unsqueeze(1).expand(batch, LENGTH)
    assert torch.equal(found.numbers, apart) or torch.equal(found.numbers, together)
    return torch.equal(found.numbers, apart), found.unread


@pytest.mark.parametrize(
    ("name", "attention", "use_cache"),
    [
        *itertools.product(["llama"], ["eager", "sdpa"], [False, True]),
        *itertools.product(["mistral", "gpt2", "bert"], ["sdpa"], [False]),
        *itertools.product(["gpt2", "xglm", "bert"], ["eager"], [True, False]),
    ],
)  # fmt: skip
def test_documents_are_those_of_the_model(name: str, attention: str, use_cache: bool) -> None:
    if name == "bert" and transformers.__version__ < "5":
        pytest.skip("BERT of transformers 4 takes no other inputs than its own, and says so")
    model = made(name, attention, use_cache)
    for form, batch in itertools.product(FORMS, (1, 2)):
        inputs = _inputs(form, batch)
        told, unread = told_apart(model, inputs, batch)
        if (name, form) == ("xglm", "blocks") and transformers.__version__ < "5":
            assert not told, "it fails by itself"
            continue
        assert told == keeps_apart(model, inputs, batch), (form, batch, unread)
        assert told or unread or form in ("nothing", "positions that go on"), "a refusal says why"
    assert told_apart(None, _inputs("positions", 2), 2)[0], "a model that is not theirs is taken at its word"


def test_a_checkpointed_model_that_trains_has_no_cache() -> None:
    model = made("gpt2", "sdpa", use_cache=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = _inputs("positions", 2)
    assert not told_apart(model, inputs, 2)[0]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # the latter is the name in transformers 4
    assert not told_apart(model, inputs, 2)[0], "in evaluation it has one"
    model.train()
    assert told_apart(model, inputs, 2)[0]
    assert keeps_apart(model, inputs, 2)


def test_settings_are_read_when_they_are_asked_for() -> None:
    model = made("llama", "sdpa", use_cache=True)
    attention = Attention(model)
    inputs = _inputs("positions", 1)
    assert "use_cache = False" in attention.why_not("position_ids", inputs, 1)
    model.config.use_cache = False
    assert not attention.why_not("position_ids", inputs, 1)


@pytest.mark.parametrize(
    ("form", "batch", "expected"),
    [("positions", 1, ""), ("positions", 2, "in a batch of one row, not of 2"), ("bounds", 1, "")],
)
def test_flash_attention(form: str, batch: int, expected: str) -> None:
    """As read in its source; there is no flash attention here. What cuts there is the lowest position alone."""
    model = made("llama", "sdpa", use_cache=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    inputs = _inputs(form, batch)
    told, unread = told_apart(model, inputs, batch)
    assert told == (not expected)
    assert expected in unread
    if form == "bounds":
        del inputs["max_length_k"]
        assert "without max_length_k" in told_apart(model, inputs, batch)[1]
    gap = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]])
    assert not told_apart(model, {"position_ids": gap}, 1)[0]


def test_a_block_mask_needs_numbers() -> None:
    class BlockMask:
        shape = (1, 1, LENGTH, LENGTH)

    model = made("llama", "sdpa")
    inputs = {"attention_mask": BlockMask(), "position_ids": POSITIONS.unsqueeze(0)}
    told, unread = told_apart(model, inputs, 1)
    assert not told
    assert "pass seq_idx as well" in unread
    assert told_apart(model, inputs | _inputs("numbers", 1), 1)[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_documents_of_any_visibility(data: st.DataObject) -> None:
    """A document starts where no token attends across, in whichever direction and whether or not to itself."""
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 7))
    place = st.integers(0, length - 1)
    seen = data.draw(st.sets(st.tuples(st.integers(0, batch - 1), place, place), max_size=length))
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for row, query, key in seen:
        mask[row, 0, query, key] = True
    expected, number = torch.zeros(batch, length, dtype=torch.long), -1
    for row, at in itertools.product(range(batch), range(length)):
        number += not any(r == row and min(q, k) < at <= max(q, k) for r, q, k in seen)
        expected[row, at] = number
    found = documents_of({"attention_mask": mask}, (batch, length), torch.device("cpu"), Attention())
    assert torch.equal(found.numbers, expected)


def test_a_class_made_on_the_fly_has_the_source_of_its_bases() -> None:
    """As FSDP2 makes them."""
    model = made("llama", "sdpa")
    model.model.__class__ = type("FSDPLlamaModel", (type(model.model),), {})
    assert told_apart(model, _inputs("positions", 2), 2)[0]


def test_inputs_get_their_names() -> None:
    model = made("llama", "sdpa")
    wrapped = nn.parallel.DataParallel(model)
    for each in (model, wrapped):
        assert Attention(each).inputs((1, 2), {"labels": 3}) == {"input_ids": 1, "attention_mask": 2, "labels": 3}
    assert Attention(nn.Linear(2, 2)).inputs((1,), {}) == {"input": 1}
    assert Attention().inputs(({"a": 1},), {"b": 2}) == {"a": 1, "b": 2}


def test_masks_of_an_encoder_say_nothing_of_the_decoder() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    attention = Attention(T5ForConditionalGeneration(config))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = documents_of({"attention_mask": mask}, (2, 3), torch.device("cpu"), attention)
    assert found.numbers.tolist() == [[0] * 3, [1] * 3]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 0]], [[0, 0, 1, 1, None, None], [2, 3, 4, 4, 4, None]]),
        ([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], [[None, None, 0, 0, None, 0], [1] * 6]),
        ([[0] * 6, [5, 5, 3, 3, 5, 6]], [[None] * 6, [0, 0, 1, 1, 0, 2]]),
        # Numbers beyond the length are not told from each other: of one document at worst.
        ([[9, 9, 9, 7, 7, 7], [1] * 6], [[0] * 6, [1] * 6]),
    ],
)
def test_a_mask_of_numbers(mask: list[list[int]], expected: list[list[int | None]]) -> None:
    told = torch.tensor(mask)
    found = documents_of({"attention_mask": told}, (2, 6), torch.device("cpu"), Attention())
    assert found.hidden is not None
    assert torch.equal(found.hidden, told == 0)
    numbers = found.numbers.tolist()
    assert [
        [None if one == 0 else number for number, one in zip(*each, strict=True)]
        for each in zip(numbers, mask, strict=True)
    ] == expected


@pytest.mark.parametrize("before", [True, False])
def test_padding_is_of_its_own_sequence(before: bool) -> None:
    """The last token of the padding before a sequence predicts the sequence's first."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    found = documents_of({"attention_mask": mask if before else mask.flip(1)}, (3, 4), torch.device("cpu"), Attention())
    assert found.numbers.tolist() == [[0] * 4, [1] * 4, [2] * 4]
