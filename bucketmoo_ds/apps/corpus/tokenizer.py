"""A byte-level BPE tokenizer trained on the corpus itself: no download, and every text in every script round-trips.

Train it on English and the seen languages only. Languages it has not seen fall back to bytes, which is what they are
for: evaluation on unseen languages measures the model with a tokenizer that knows nothing of them either.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bucketmoo_ds.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

_BYTES = 256


def train(texts: Mapping[str, Iterable[str]], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        texts: language -> texts. All are used, none is weighted.
        vocab_size: most tokens to have, including 256 bytes and two special ones. Little text gives fewer.

    Raises:
        ConfigError: `vocab_size` leaves no room for bytes and special tokens, or there is no text.
    """
    special = [END_OF_TEXT, PADDING]
    if vocab_size < _BYTES + len(special):
        raise ConfigError(f"vocab_size = {vocab_size}: expected at least {_BYTES + len(special)} (bytes and {special})")
    tokenizer = Tokenizer(models.BPE())
    # No prefix space and no normaliser: either would make decoding differ from the text.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ordered = [text for language in sorted(texts) for text in texts[language]]
    if not any(ordered):
        raise ConfigError(f"texts: no text to train a tokenizer on, in languages {sorted(texts)}")
    tokenizer.train_from_iterator(ordered, trainer, length=len(ordered))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write the tokenizer into `folder`, in the format of transformers."""
    tokenizer.save_pretrained(folder)


def load(folder: str | Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer that `save` wrote.

    Raises:
        ConfigError: `folder` holds none. (transformers would take the name for one on its hub.)
    """
    if not Path(folder, "tokenizer.json").is_file():
        raise ConfigError(f"tokenizer = {str(folder)!r}: the folder has no tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens.

    Text that happens to read like a special token (a page about tokenizers says "<|endoftext|>") is encoded as text,
    so that an end-of-text token always is a true end of text.
    """
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
