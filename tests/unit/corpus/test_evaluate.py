"""Bits per byte against hand computations, and its split over ranks."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from unit.corpus.random_text import random_texts

from bucketmoo_ds.apps.corpus import evaluate, tokenizer
from bucketmoo_ds.errors import ConfigError


class Bigram(nn.Module):
    """p(next | this) from a random table: its likelihood of a text can be summed by hand, whatever the windows."""

    def __init__(self, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(scale * torch.randn(vocab_size, vocab_size))
        self.calls = 0

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.calls += 1
        assert not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.table[input_ids])


def measure(model: nn.Module, sets: list[evaluate.EvaluationSet], batch_size: int = 4) -> dict[str, float]:
    return evaluate.bits_per_byte(evaluate.nll_sums(model, sets, batch_size), sets)


def prepare(texts: dict[str, list[str]], tok: PreTrainedTokenizerFast, length: int) -> list[evaluate.EvaluationSet]:
    return [evaluate.prepare(language, documents, tok, length) for language, documents in texts.items()]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 50), batch_size=st.integers(1, 9))
def test_uniform_and_bigram_models_by_hand(
    small_tokenizer: PreTrainedTokenizerFast, seed: int, length: int, batch_size: int
) -> None:
    vocab, eos = len(small_tokenizer), small_tokenizer.eos_token_id
    torch.manual_seed(seed)
    texts = random_texts(seed, texts=6)
    sets = prepare(texts, small_tokenizer, length)
    uniform = measure(Bigram(vocab, scale=0.0), sets, batch_size)
    bigram = Bigram(vocab)
    log_p = bigram.table.detach().double().log_softmax(-1)
    measured = measure(bigram, sets, batch_size)
    for one, documents in zip(sets, texts.values(), strict=True):
        size = sum(len(text.encode()) for text in documents)
        ids = tokenizer.encode(small_tokenizer, documents)
        assert (one.bytes, one.tokens) == (size, sum(map(len, ids)))
        # The model's log-softmax is float32, good to 1e-6 of each term; terms share a sign, so the sum is as good.
        assert uniform[one.language] == pytest.approx(one.tokens * math.log2(vocab) / size, rel=1e-5)
        nats = -sum(log_p[a, b].item() for text in ids for a, b in zip([eos, *text[:-1]], text, strict=True))
        assert measured[one.language] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.fixture(scope="module")
def gpt(small_tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(small_tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=256, initializer_range=0.5,
        bos_token_id=small_tokenizer.eos_token_id, eos_token_id=small_tokenizer.eos_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def test_one_window_equals_direct_evaluation(gpt: GPT2LMHeadModel, small_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = random_texts(seed=11, texts=3, words=10)["ru"]
    [one] = prepare({"ru": texts}, small_tokenizer, 256)
    assert len(one.inputs) == 1
    eos = small_tokenizer.eos_token_id
    stream = [eos, *(token for ids in tokenizer.encode(small_tokenizer, texts) for token in (*ids, eos))]
    gpt.eval()
    with torch.no_grad():
        log_p = gpt(input_ids=torch.tensor([stream])).logits[0].double().log_softmax(-1)
    nats = -sum(log_p[i, token].item() for i, token in enumerate(stream[1:]) if token != eos)
    # float32 logits, summed over about 100 tokens; the padded forward reorders its sums.
    assert measure(gpt, [one])["ru"] == pytest.approx(nats / math.log(2) / one.bytes, rel=1e-5)


def test_windows_overlap_by_one_token_and_cover_all(small_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = random_texts(seed=5)["de"]
    one = evaluate.prepare("de", texts, small_tokenizer, 16)
    assert one.inputs[0, 0] == small_tokenizer.eos_token_id
    scored = one.targets != -100
    # Inside the stream, a window's first input is the target the window before ended with.
    ends, starts = one.targets[:-1, -1], one.inputs[1:, 0]
    assert torch.equal(torch.where(ends == -100, small_tokenizer.eos_token_id, ends), starts)
    assert one.targets[scored].tolist() == [t for ids in tokenizer.encode(small_tokenizer, texts) for t in ids]


@pytest.mark.parametrize("world", [2, 3, 7, 50])
def test_shards_add_up_and_call_equally_often(small_tokenizer: PreTrainedTokenizerFast, world: int) -> None:
    torch.manual_seed(world)
    sets = prepare(random_texts(seed=world), small_tokenizer, 16)
    model = Bigram(len(small_tokenizer))
    whole = evaluate.nll_sums(model, sets, 5)
    parts, calls = [], []
    for rank in range(world):
        model.calls = 0
        parts.append(evaluate.nll_sums(model, sets, 5, shard=(rank, world)))
        calls.append(model.calls)
    assert len(set(calls)) == 1
    # float64 sums in another order.
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_max_bytes_takes_whole_texts(small_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = random_texts(seed=6)["ko"]
    sizes = [len(text.encode()) for text in texts]
    cap = sum(sizes[:10]) + sizes[10] // 2
    assert evaluate.prepare("ko", texts, small_tokenizer, 16, max_bytes=cap).bytes == sum(sizes[:10])
    assert evaluate.prepare("ko", texts, small_tokenizer, 16, max_bytes=1).bytes == sizes[0]
    assert evaluate.prepare("ko", texts, small_tokenizer, 16, max_bytes=sum(sizes)).bytes == sum(sizes)


def test_every_module_keeps_its_mode(gpt: GPT2LMHeadModel, small_tokenizer: PreTrainedTokenizerFast) -> None:
    sets = prepare(random_texts(seed=7, texts=2), small_tokenizer, 32)
    gpt.train()
    gpt.transformer.h[0].eval()
    before = {name: module.training for name, module in gpt.named_modules()}
    first = measure(gpt, sets)
    assert first == measure(gpt, sets), "dropout must be off"
    assert {name: module.training for name, module in gpt.named_modules()} == before
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_errors(small_tokenizer: PreTrainedTokenizerFast) -> None:
    model = Bigram(len(small_tokenizer))
    good = evaluate.prepare("de", ["abc"], small_tokenizer, 8)
    other = evaluate.prepare("ru", ["абв"], small_tokenizer, 9)
    with pytest.raises(ConfigError, match="language 'de': no held-out text"):
        evaluate.prepare("de", ["", ""], small_tokenizer, 8)
    with pytest.raises(ConfigError, match="windows of one length"):
        evaluate.nll_sums(model, [good, other], 2)
    with pytest.raises(ConfigError, match="windows of one length"):
        evaluate.nll_sums(model, [], 2)
    with pytest.raises(ConfigError, match=r"shard = \(2, 2\)"):
        evaluate.nll_sums(model, [good], 2, shard=(2, 2))
    with pytest.raises(ConfigError, match="batch_size = 0"):
        evaluate.nll_sums(model, [good], 0)
    with pytest.raises(ConfigError, match="max_bytes = 0"):
        evaluate.prepare("de", ["abc"], small_tokenizer, 8, max_bytes=0)
