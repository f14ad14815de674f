"""Bits per byte of a causal language model on held-out text, comparable across languages and tokenizers.

    sets = [prepare(language, texts, tokenizer, sequence_length) for language, texts in held_out.items()]
    sums = nll_sums(model, sets, batch_size)               # on each rank: its shard=(rank, world)
    bits_per_byte(sums, sets)                              # after the caller has all-reduced the sums

What is counted. The text of a language is `<eos> text <eos> text ...`. Every token of every text is predicted exactly
once, from what stands before it in its window; end-of-text tokens are context only: their own prediction counts no
bits, as they stand for no byte of the text. Windows overlap by one token, so that the first token of a window has the
last one of the window before as its context. Then bits per byte = sum of -log2 p(token) / UTF-8 bytes of the texts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bucketmoo_ds.apps.corpus.packing import IGNORED_LABEL, end_of_text_id, token_stream
from bucketmoo_ds.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Held-out text of one language, tokenised once for many evaluations.

    Attributes:
        language: its name.
        inputs: int64 `[windows, sequence_length]`, padded with end-of-text tokens.
        targets: int64 `[windows, sequence_length]`, the token after each input; -100 where nothing is scored.
        bytes: UTF-8 bytes of the scored text.
        tokens: number of scored tokens.
    """

    language: str
    inputs: Tensor
    targets: Tensor
    bytes: int
    tokens: int


def prepare(
    language: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_bytes: int | None = None,
) -> EvaluationSet:
    """Cut held-out texts into windows.

    Args:
        language: name of the language.
        texts: whole texts; none is cut, as half a token has no bytes.
        tokenizer: must encode without loss, or the bits of the lost bytes would not be counted.
        sequence_length: inputs in a window, as in training.
        max_bytes: texts are taken in their order for as long as their sum stays within, but at least one.

    Raises:
        ConfigError: no text, or `sequence_length` or `max_bytes` out of range.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length = {sequence_length}: expected at least 1")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes = {max_bytes}: expected at least 1, or none for all the text")
    taken: list[str] = []
    size = 0
    for text in texts:
        size_with_text = size + len(text.encode())
        if taken and max_bytes is not None and size_with_text > max_bytes:
            break
        taken.append(text)
        size = size_with_text
    if size == 0:
        raise ConfigError(f"language {language!r}: no held-out text to evaluate on")

    eos = end_of_text_id(tokenizer)
    # [eos, text, eos, text, ..., eos]: the last one is nobody's context and is cut off again.
    stream = torch.tensor([eos, *token_stream(taken, tokenizer)[:-1].tolist()], dtype=torch.int64)
    windows = math.ceil((len(stream) - 1) / sequence_length)
    padding = windows * sequence_length + 1 - len(stream)
    stream = nn.functional.pad(stream, (0, padding), value=eos)
    inputs = stream[:-1].view(windows, sequence_length)
    targets = stream[1:].view(windows, sequence_length)
    targets = targets.masked_fill(targets == eos, IGNORED_LABEL)
    return EvaluationSet(language, inputs, targets, bytes=size, tokens=int((targets != IGNORED_LABEL).sum()))


def nll_sums(
    model: nn.Module,
    sets: Sequence[EvaluationSet],
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
) -> Tensor:
    """Summed negative log-likelihood of each language, over this shard's windows.

    All shards call the model equally often, also where the batches do not divide: a sharded model (ZeRO-3, FSDP)
    communicates in its forward pass, and a rank that called once less would leave the others waiting.

    Args:
        model: called as `model(input_ids=[B, T])`, returns an object with `.logits` `[B, T, V]`, T being the sets'
            `sequence_length`. Runs in evaluation mode without gradients; every module's own mode is restored.
        sets: one a language, all with windows of one length.
        batch_size: windows in a call.
        shard: `(rank, world)`. The sums of all ranks add up to those of `(0, 1)`.
        device: where the inputs go, default the device of the model's first parameter.

    Returns:
        float64 `[len(sets)]` on `device`, in nats. All-reduce it before `bits_per_byte`.

    Raises:
        ConfigError: no sets, windows of different lengths, `batch_size` or `shard` out of range.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ConfigError(f"shard = {shard}: expected (rank, world) with 0 <= rank < world")
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: expected at least 1")
    if len({one.inputs.shape[1] for one in sets}) != 1:
        raise ConfigError(f"sets: expected windows of one length, got {[tuple(one.inputs.shape) for one in sets]}")
    if device is None:
        device = next(model.parameters()).device

    inputs = torch.cat([one.inputs for one in sets]).split(batch_size)
    targets = torch.cat([one.targets for one in sets]).split(batch_size)
    owners = torch.arange(len(sets)).repeat_interleave(torch.tensor([len(one.inputs) for one in sets]))
    owners_of_batch = owners.split(batch_size)

    sums = torch.zeros(len(sets), dtype=torch.float64, device=device)
    with _evaluation_mode(model), torch.no_grad():
        for first in range(0, len(inputs), world):
            mine = first + rank
            batch = min(mine, len(inputs) - 1)
            logits = model(input_ids=inputs[batch].to(device)).logits
            if mine < len(inputs):
                nll = nn.functional.cross_entropy(
                    logits.float().flatten(0, 1),
                    targets[batch].to(device).flatten(),
                    ignore_index=IGNORED_LABEL,
                    reduction="none",
                )
                by_window = nll.view(logits.shape[:2]).sum(dim=1, dtype=torch.float64)
                sums.index_add_(0, owners_of_batch[batch].to(device), by_window)
    return sums


def bits_per_byte(sums: Tensor, sets: Sequence[EvaluationSet]) -> dict[str, float]:
    """Bits per byte by language from the complete sums `[len(sets)]` (nats) of `nll_sums`."""
    return {one.language: nats / math.log(2) / one.bytes for one, nats in zip(sets, sums.tolist(), strict=True)}


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a frozen part may have been in evaluation mode all along.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
