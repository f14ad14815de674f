"""Packing: one language a sequence, and every token accounted for."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from unit.corpus.random_text import random_texts

from bucketmoo_ds.apps.corpus import packing, tokenizer
from bucketmoo_ds.errors import ConfigError


@pytest.mark.parametrize("remainder", ["drop", "pad"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), length=st.integers(2, 40))
def test_token_accounting(
    small_tokenizer: PreTrainedTokenizerFast, remainder: Literal["drop", "pad"], seed: int, length: int
) -> None:
    texts = random_texts(seed)
    packed = packing.pack(texts, small_tokenizer, length, remainder)
    assert packed.column_names == ["input_ids", "labels", "language"]
    eos = small_tokenizer.eos_token_id
    for language, documents in texts.items():
        expected = [token for ids in tokenizer.encode(small_tokenizer, documents) for token in (*ids, eos)]
        mine = packed.filter(lambda name, language=language: name == language, input_columns="language")
        inputs, labels = np.array(mine["input_ids"][:]), np.array(mine["labels"][:])
        assert inputs.shape == labels.shape
        assert inputs.shape[1] == length
        kept = labels.ravel() != -100
        assert (inputs == labels).ravel()[kept].all()
        if remainder == "drop":
            assert inputs.ravel().tolist() == expected[: len(expected) // length * length]
            assert kept.all()
        else:
            assert inputs.ravel()[kept].tolist() == expected
            assert inputs.shape[0] == -(-len(expected) // length)


def test_a_sequence_has_the_letters_of_its_language_only(small_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = random_texts(seed=1)
    packed = packing.pack(texts, small_tokenizer, 16)
    assert set(packed["language"]) == set(texts)
    for row in packed:
        # A cut may leave half a character at an end, which decodes to the replacement character.
        decoded = small_tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert set(decoded) - {"\N{REPLACEMENT CHARACTER}"} <= {*" ", *"".join(texts[row["language"]])}


def test_batches_of_texts_do_not_change_the_stream(
    small_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_texts(seed=2)["ko"]
    whole = packing.token_stream(texts, small_tokenizer)
    monkeypatch.setattr(packing, "_TEXTS_A_BATCH", 7)
    assert np.array_equal(packing.token_stream(texts, small_tokenizer), whole)
    assert whole.dtype == np.int32


def test_works_as_a_torch_dataset(small_tokenizer: PreTrainedTokenizerFast) -> None:
    torch = pytest.importorskip("torch")
    row = packing.pack(random_texts(seed=3), small_tokenizer, 8).with_format("torch")[5]
    assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
    assert isinstance(row["language"], str)


def test_errors(small_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"language 'ru': its 1 texts have \d tokens, fewer than one sequence"):
        packing.pack({"ru": ["да"]}, small_tokenizer, 64)
    assert len(packing.pack({"ru": ["да"]}, small_tokenizer, 64, "pad")) == 1
    with pytest.raises(ConfigError, match="language 'ru': its 0 texts"):
        packing.pack({"ru": []}, small_tokenizer, 64, "pad")
    with pytest.raises(ConfigError, match="sequence_length = 1: expected at least 2"):
        packing.pack({"ru": ["да"]}, small_tokenizer, 1)
    with pytest.raises(ConfigError, match='remainder = "keep": expected "drop" or "pad"'):
        packing.pack({"ru": ["да"]}, small_tokenizer, 8, "keep")  # type: ignore[arg-type]
    endless = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        packing.pack({"ru": ["да"]}, endless, 8)
