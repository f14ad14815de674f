"""The tokenizer loses nothing, in any script, and is the same each time it is trained."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bucketmoo_ds.apps.corpus import tokenizer
from bucketmoo_ds.errors import ConfigError


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
@example(text="தமிழ் எழுத்துகள் , don 't !")
@example(text="עברית\u200f \u202bמימין\u202c לשמאל")  # noqa: RUF001
@example(text="say <|endoftext|> and <|pad|> aloud")
@example(text="  two  spaces \r\n\t 👩‍👩‍👧 ﬁ Å Å \0")
def test_round_trip_of_any_text(small_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    [ids] = tokenizer.encode(small_tokenizer, [text])
    assert small_tokenizer.decode(ids) == text
    assert not {small_tokenizer.eos_token_id, small_tokenizer.pad_token_id} & set(ids)


def test_training_is_deterministic_and_bounded(small_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {"de": [f"Wort{i % 97} und Wort{i % 89}" for i in range(2000)], "el": ["λόγος και έργο"] * 5}
    first, again = tokenizer.train(texts, 300), tokenizer.train(dict(reversed(texts.items())), 300)
    assert first.get_vocab() == again.get_vocab()
    assert len(first) == 300
    assert first.eos_token_id != first.pad_token_id
    assert max(first.get_vocab().values()) == 299


def test_training_shortens_what_it_was_trained_on() -> None:
    seen, unseen = "мир и труд " * 50, "ქართული ენა " * 50
    trained = tokenizer.train({"ru": [seen]}, 300)
    [on_seen], [on_unseen] = tokenizer.encode(trained, [seen]), tokenizer.encode(trained, [unseen])
    assert len(on_seen) < 0.5 * len(seen.encode())
    assert len(on_unseen) > 0.9 * len(unseen.encode())


def test_save_and_load(small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save(small_tokenizer, tmp_path / "tokenizer")
    loaded = tokenizer.load(tmp_path / "tokenizer")
    text = "äbe абв 가나 <|pad|> தமிழ் , ."
    assert tokenizer.encode(loaded, [text]) == tokenizer.encode(small_tokenizer, [text])
    assert loaded.decode(tokenizer.encode(loaded, [text])[0]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (small_tokenizer.eos_token_id, small_tokenizer.pad_token_id)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size = 257: expected at least 258"):
        tokenizer.train({"de": ["Text"]}, 257)
    with pytest.raises(ConfigError, match=r"no text to train a tokenizer on, in languages \['de'\]"):
        tokenizer.train({"de": []})
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        tokenizer.load(tmp_path)
