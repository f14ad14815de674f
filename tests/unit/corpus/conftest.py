"""A small tokenizer, shared by the tests of this folder."""

import pytest
from transformers import PreTrainedTokenizerFast
from unit.corpus.random_text import random_texts

from bucketmoo_ds.apps.corpus import tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer.train(random_texts(seed=0), vocab_size=400)
