"""What one forward pass of mixed languages says about its rows: of every token the language and the document, and how
many target tokens each language has.

A row's language is the one whose loss its gradient comes from. Where attention crosses from one language to another, a
row has several, and no weight is right for it: a sequence of several languages has to say which tokens attend to each
other (`bucketmoo_ds.data.attention` says how), or is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.data.attention import Attention
from bucketmoo_ds.data.batch import TOKENS_KEY
from bucketmoo_ds.data.documents import Documents, documents_of, onto
from bucketmoo_ds.data.faults import Check, Faults
from bucketmoo_ds.data.languages import LanguageTable, plain
from bucketmoo_ds.data.targets import by_language, labelled, stated
from bucketmoo_ds.errors import LanguageError

# The inputs that tell the shape of a batch, the likeliest first; without one of them it is the first tensor.
_SHAPES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")

_RAGGED = "language: expected one for each sequence, or for each as many as it has tokens, all sequences equally long"
_WAY_OUT = (
    "Pass position_ids that start again with each document (no attention_mask, use_cache=False), to flash attention "
    "cu_seq_lens_q, or an attention_mask [batch, 1, sequence, sequence] that hides the other documents; and give all "
    "tokens of a document one language"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one forward pass. Tensors lie where the model's inputs do.

    Args:
        languages: `[batch, sequence]` int64, the language of each token; -1: none.
        documents: `[batch, sequence]` int64, the document of each token, from 0 through the whole micro-batch;
            of padding it says nothing.
        targets: `[batch, sequence]`, tokens that the loss is taken over and that each token predicts.
        target_tokens: `[K]` int64, their sum by language.
        checks: what is only known once a device has answered.
        by_sequence: `[batch]` int64, the language of each sequence; `None` where it was given by token.
        packed: whether an input tells of documents within the sequences.
    """

    languages: Tensor
    documents: Tensor
    targets: Tensor
    target_tokens: Tensor
    checks: tuple[Check, ...] = ()
    by_sequence: Tensor | None = None
    packed: bool = False

    def check(self) -> None:
        """Waits for the device's answers.

        Raises:
            LanguageError: the rows are not what they have to be.
        """
        for check in self.checks:
            if check.number.read().item():
                raise LanguageError(check.text)

    def of_shape(self, leading: torch.Size) -> Tensor | None:
        """Returns the languages of activations, int64 of the shape `leading`: that of all their dimensions but the
        last, which are `[batch, sequence]`, the same in one dimension, or, where languages are given by sequence,
        `[batch]` or `[batch, other]`. `None`: they are of another shape."""
        return _shaped(self.languages, self.by_sequence, leading)

    def groups_of_shape(self, groups: Tensor, leading: torch.Size) -> Tensor | None:
        """As `of_shape`, of any numbers `[batch, sequence]` that follow from languages and documents; of another
        sequence length each sequence has its first token's."""
        return _shaped(groups, None if self.by_sequence is None else groups[:, 0], leading)

    def documents_of_shape(self, leading: torch.Size) -> Tensor | None:
        """As `of_shape`, the documents; `None` also for another sequence length if sequences hold several of them."""
        return _shaped(self.documents, None if self.packed else self.documents[:, 0], leading)


def rows_of(
    value: object,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    table: LanguageTable,
    *,
    shifted: bool,
    attention: Attention | None = None,
    target_tokens: object = None,
) -> Rows:
    """Returns what a forward pass says about its rows. The host waits for no device; what lies on the host is checked
    at once, the rest by `Rows.check`.

    Without labels or `target_tokens` each sequence counts as one target token, and each token where languages are given
    by token.

    Args:
        value: the batch's languages: a name or index for all of it; `[batch]` or `[batch, sequence]` of them, as lists,
            arrays or tensors. In these -1 is none, for padding.
        args, kwargs: of the forward pass, without the languages.
        table: the languages.
        shifted: whether position t predicts `labels[..., t + 1]`.
        attention: what the model reads of its inputs; without it the model is taken at its word.
        target_tokens: the batch's entry of that name where it was taken off: `[K]`, or one number where the batch is of
            one language.

    Raises:
        LanguageError: the languages are none of the table's, do not fit the batch, or cross documents.
    """
    attention = attention or Attention()
    inputs = attention.inputs(args, kwargs)
    shape, device = _shape_of(inputs)
    faults = Faults()
    told = onto(_indices(value, table, faults), device)
    documents = documents_of(inputs, shape, device, attention)
    by_sequence = None
    if told.dim() == 0:
        by_sequence, languages = told.expand(shape[0]), told.expand(shape)
    elif told.dim() == 1:
        if len(told) != shape[0]:
            raise LanguageError(
                f"language: {len(told)} values for a batch of {list(shape)} tokens; expected one for each of its "
                f"{shape[0]} sequences, or one for each token, [batch, sequence]"
            )
        by_sequence, languages = told, told.unsqueeze(1).expand(shape)
    else:
        languages = told
        _check_by_token(told, shape, inputs, attention)
        _check_documents(told, documents, len(table), shifted, faults)
    number = inputs.get(TOKENS_KEY) if target_tokens is None else target_tokens
    if number is None:
        targets = labelled(inputs, languages, by_sequence, len(table), shifted, faults)
    else:
        targets = stated(number, languages, len(table), faults)
    target_tokens = by_language(languages, targets, len(table)).round().long()
    checks, packed = tuple(faults.open), bool(documents.told_by)
    return Rows(languages, documents.numbers, targets, target_tokens, checks, by_sequence, packed)


def _shaped(numbers: Tensor, by_sequence: Tensor | None, leading: torch.Size) -> Tensor | None:
    if leading == numbers.shape:
        return numbers
    if by_sequence is not None and len(leading) in (1, 2) and leading[0] == len(by_sequence):
        return by_sequence if len(leading) == 1 else by_sequence.unsqueeze(1).expand(leading)
    return numbers.reshape(leading) if leading == (numbers.numel(),) else None


def _shape_of(inputs: Mapping[str, Any]) -> tuple[tuple[int, int], torch.device]:
    """Returns `(batch, sequence)` and the device of a model's inputs; rows of features are sequences of one token."""
    named = [inputs.get(name) for name in _SHAPES]
    tensor = next((each for each in [*named, *inputs.values()] if isinstance(each, Tensor) and each.dim()), None)
    if tensor is None:
        raise LanguageError("the forward pass got no tensor that would tell how many sequences its batch has")
    tokens = tensor.dim() == 3 if tensor.is_floating_point() else tensor.dim() > 1
    return (tensor.shape[0], tensor.shape[1] if tokens else 1), tensor.device


def _indices(value: object, table: LanguageTable, faults: Faults) -> Tensor:
    """Returns int64 indices in the shape that the languages were given in, -1 for none."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, Tensor) for each in value):
        if len({each.shape for each in value}) > 1:
            raise LanguageError(_RAGGED)
        value = torch.stack(tuple(value))
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.dtype == torch.bool:
            raise LanguageError(f"language: a tensor of {value.dtype}; expected whole numbers")
        value = value.long()
        wrong = (value < (-1 if value.dim() else 0)) | (value >= len(table))
        faults.expect_none(
            wrong.sum(),
            f"language: an index that is none; expected 0 to {len(table) - 1} ({', '.join(table.names)}), or -1 for "
            "padding",
        )
        return torch.where(wrong, -1, value)  # an index beyond a table's end would stop the device
    value = plain(value)
    if not isinstance(value, (list, tuple)):
        return torch.tensor(table.index(value))
    rows: list[Any] = [plain(each) for each in value]
    lengths = {len(row) if isinstance(row, (list, tuple)) else None for row in rows}
    if len(lengths) > 1:
        raise LanguageError(_RAGGED)
    by_token = lengths not in (set(), {None})
    items = [plain(item) for row in rows for item in row] if by_token else rows
    different = {repr(item): item for item in items}  # 1 and True are equal
    known = {key: -1 if key == "-1" else table.index(item) for key, item in different.items()}
    indices = torch.tensor([known[repr(item)] for item in items], dtype=torch.int64)
    return indices.view(len(rows), -1) if by_token else indices


def _check_by_token(told: Tensor, shape: tuple[int, int], inputs: Mapping[str, Any], attention: Attention) -> None:
    longer = "an encoder and a decoder, whose sequences differ" if attention.has_decoder(inputs) else ""
    longer = "virtual tokens (peft), which have no place in it" if attention.has_virtual_tokens else longer
    if longer:
        raise LanguageError(
            f"language: given by token, {list(told.shape)}, to a model of {longer}; give one for each sequence, [batch]"
        )
    if told.shape != shape:
        raise LanguageError(f"language: {list(told.shape)} for a batch of {list(shape)} tokens, [batch, sequence]")


def _check_documents(languages: Tensor, documents: Documents, count: int, shifted: bool, faults: Faults) -> None:
    """Expects each document to be of one language, and no token whose gradient would be dropped."""
    numbers, tokens = documents.numbers.flatten(), languages.flatten()
    hidden = torch.zeros_like(tokens, dtype=torch.bool) if documents.hidden is None else documents.hidden.flatten()
    has = (tokens >= 0) & ~hidden
    here = torch.arange(len(tokens), device=tokens.device)

    def of_documents(values: Tensor, start: int, reduce: str) -> Tensor:
        return torch.full_like(tokens, start).scatter_reduce(0, numbers, values, reduce)

    highest = of_documents(torch.where(has, tokens, -1), -1, "amax")
    lowest = of_documents(torch.where(has, tokens, count), count, "amin")
    several = "a document that holds several languages" if documents.told_by else "a sequence of several languages"
    faults.expect_none(
        (highest > lowest).sum(),
        f"language: {several}, as far as the model reads: attention goes from one to the other, so a token's gradient "
        f"would belong to several languages. {_WAY_OUT}{documents.unread and f'. Not followed: {documents.unread}'}",
    )
    last = of_documents(torch.where(has, here, -1), -1, "amax")[numbers]
    reached = here < last if shifted else last >= 0
    faults.expect_none(
        ((tokens < 0) & ~hidden & reached).sum(),
        "language: -1 for a token that others of its document attend to: its gradient would be lost. Give it the "
        "language of its document; -1 is for padding, after a document or hidden by attention_mask",
    )
