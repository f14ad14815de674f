"""From texts to training sequences of one length, each in one language.

    de: text <eos> text <eos> ... cut every `sequence_length` tokens
    fr: text <eos> text <eos> ... cut every `sequence_length` tokens

Packing never crosses from one language to the next: the conflict between languages is resolved on gradients of one
language each. Rows that are tokenised already keep their lengths, and are padded to the longest of a micro-batch.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from bucketmoo_ds.apps.corpus.tokenizer import encode
from bucketmoo_ds.errors import ConfigError

IGNORED_LABEL = -100

# Texts handed to the tokenizer at once: enough to keep its threads busy, few enough to bound memory.
_TEXTS_A_BATCH = 1000


def pack(
    texts: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    remainder: Literal["drop", "pad"] = "drop",
) -> Dataset:
    """Tokenise, join and cut the texts of each language.

    Args:
        texts: language -> texts; the order is kept.
        tokenizer: of transformers, with an end-of-text token, which follows every text.
        sequence_length: tokens in a sequence.
        remainder: what to do with the last tokens of a language, fewer than `sequence_length`. `"drop"` leaves them
            out; `"pad"` fills up with end-of-text tokens whose labels are -100 (a causal model never looks at them
            from the tokens before, so no attention mask is needed).

    Returns:
        Map-style dataset in memory, 8 bytes a token, languages one after the other, with columns

        * `input_ids`: int32, `sequence_length` token ids,
        * `labels`: int32, the same ids, -100 where padded; the model shifts them, as those of transformers do,
        * `language`: string.

    Raises:
        ConfigError: the tokenizer has no end-of-text token, `sequence_length` or `remainder` is out of range, or a
            language has too little text for one sequence.
    """
    if sequence_length < 2:
        raise ConfigError(f"sequence_length = {sequence_length}: expected at least 2, a token and the one it predicts")
    if remainder not in ("drop", "pad"):
        raise ConfigError(f'remainder = "{remainder}": expected "drop" or "pad"')
    eos = end_of_text_id(tokenizer)

    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    languages: list[str] = []
    for language, documents in texts.items():
        stream = token_stream(documents, tokenizer)
        whole, rest = divmod(len(stream), sequence_length)
        if whole == 0 and (rest == 0 or remainder == "drop"):
            raise ConfigError(
                f"language {language!r}: its {len(documents)} texts have {len(stream)} tokens, fewer than one sequence "
                f'of sequence_length = {sequence_length}; add text, shorten the sequences, or set remainder = "pad"'
            )
        targets = stream
        if rest and remainder == "pad":
            padding = sequence_length - rest
            stream = np.pad(stream, (0, padding), constant_values=eos)
            targets = np.pad(targets, (0, padding), constant_values=IGNORED_LABEL)
            whole += 1
        inputs.append(stream[: whole * sequence_length])
        labels.append(targets[: whole * sequence_length])
        languages.extend([language] * whole)
    if not languages:
        raise ConfigError("texts: no language to pack")
    return Dataset(
        pa.table(
            {
                "input_ids": _rows(inputs, sequence_length),
                "labels": _rows(labels, sequence_length),
                "language": pa.array(languages),
            },
            schema=FEATURES.arrow_schema,
        )
    )


FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "language": Value("string")})


def pad(rows: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put rows of any lengths into one micro-batch, filled up at their ends.

    Args:
        rows: `input_ids` and `labels`, each [length] a row.

    Returns:
        `input_ids` and `labels`, each [rows, longest], the latter -100 where filled up; and, only where rows were of
        different lengths, `attention_mask`, 0 there.
    """
    inputs = pad_sequence(list(rows["input_ids"]), batch_first=True)
    labels = pad_sequence(list(rows["labels"]), batch_first=True, padding_value=IGNORED_LABEL)
    lengths = torch.tensor([len(row) for row in rows["input_ids"]])
    batch = {"input_ids": inputs, "labels": labels}
    if int(lengths.min()) < inputs.shape[1]:
        batch["attention_mask"] = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return batch


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of all texts in their order, each followed by the end-of-text token; int32 `[tokens]`."""
    eos = end_of_text_id(tokenizer)
    parts = [np.empty(0, dtype=np.int32)]
    for start in range(0, len(texts), _TEXTS_A_BATCH):
        for ids in encode(tokenizer, list(texts[start : start + _TEXTS_A_BATCH])):
            parts.append(np.array([*ids, eos], dtype=np.int32))
    return np.concatenate(parts)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the end-of-text token; raises ConfigError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("tokenizer: has no end-of-text token to separate texts with; set its eos_token")
    return int(tokenizer.eos_token_id)


def _rows(streams: list[np.ndarray], length: int) -> pa.ChunkedArray:
    """Cut each stream into rows without copying it; a chunk a language."""
    return pa.chunked_array(
        [
            pa.ListArray.from_arrays(np.arange(0, len(stream) + 1, length, dtype=np.int32), pa.array(stream))
            for stream in streams
        ]
    )
