"""The target tokens of a batch of mixed languages, by language.

A target token counts for the language of the position that predicts it: the gradient of its loss goes through the rows
of that position's document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.data.batch import IGNORED_LABEL, TOKENS_KEY
from bucketmoo_ds.data.documents import onto
from bucketmoo_ds.data.faults import Faults
from bucketmoo_ds.errors import LanguageError


def labelled(
    inputs: Mapping[str, Any], languages: Tensor, by_sequence: Tensor | None, count: int, shifted: bool, faults: Faults
) -> Tensor:
    """Returns the target tokens of each token, `[batch, sequence]` int64, that the labels tell; those of a sequence as
    a whole stand at its first. Without labels whatever has a language given counts as one.

    Args:
        languages: `[batch, sequence]`.
        by_sequence: `[batch]`, where the language is given by sequence.
        shifted: whether position t predicts `labels[..., t + 1]`.
    """
    shift_labels = inputs.get("shift_labels")
    labels = inputs.get("labels") if shift_labels is None else shift_labels
    of = languages if by_sequence is None else by_sequence
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return _at_first((of >= 0).long(), languages)
    if labels.shape[: of.dim()] != of.shape or (by_sequence is None and labels.dim() != 2):
        raise LanguageError(
            f"language: {list(of.shape)}, but labels are {list(labels.shape)}: it is not told which language a label "
            f"counts for; add the entry {TOKENS_KEY} to the batch, a number for each of the {count} languages"
        )
    moved = shifted and labels.dim() > 1 and shift_labels is None
    targets = onto(labels[..., 1:] if moved else labels, of.device) != IGNORED_LABEL
    if targets.dim() == 2 and targets.shape[1] <= languages.shape[1]:
        of = languages[:, : targets.shape[1]]
    else:  # a sequence's own length, as a decoder's
        targets = targets.flatten(1).sum(1) if targets.dim() > 1 else targets
    faults.expect_none(
        (targets * (of < 0)).sum(),
        "language: target tokens belong to no language (-1); give their language, or set their labels to "
        f"{IGNORED_LABEL}",
    )
    return _at_first(targets.long(), languages)


def stated(number: Any, languages: Tensor, count: int, faults: Faults) -> Tensor:
    """Returns the target tokens of each token, `[batch, sequence]` float64, of a batch that states them by language,
    `[K]`, or as one number where it is of one language: a language's are shared among its tokens."""
    try:
        told = number if isinstance(number, Tensor) else torch.as_tensor(number)
    except (TypeError, ValueError, RuntimeError):
        told = torch.tensor(math.nan)
    whole = not (told.is_floating_point() or told.dtype == torch.bool)
    if not whole or told.shape not in ((count,), ()):
        raise LanguageError(
            f"{TOKENS_KEY} = {number!r}: expected a whole number for each of the {count} languages, or one where the "
            "batch is of one language"
        )
    told = onto(told, languages.device).long()
    faults.expect_none((told < 0).sum(), f"{TOKENS_KEY}: a number below 0")
    of_language = by_language(languages, torch.ones_like(languages), count)
    if not told.dim():
        faults.expect_none(
            ((of_language > 0).sum() != 1).long(),
            f"{TOKENS_KEY} is one number, but the batch is not of one language; give one for each of the {count} "
            "languages",
        )
    else:
        faults.expect_none(
            ((told > 0) & (of_language == 0)).sum(), f"{TOKENS_KEY}: tokens of a language that no row of the batch has"
        )
    each = told.expand(count) / of_language.clamp(min=1).double()
    return torch.where(languages >= 0, each[languages.clamp(min=0)], 0.0)


def _at_first(targets: Tensor, languages: Tensor) -> Tensor:
    """Returns numbers by token or by sequence as numbers by token, `[batch, sequence]`."""
    at = torch.zeros_like(languages)
    if targets.dim() == 1:
        at[:, 0] = targets
    else:
        at[:, : targets.shape[1]] = targets
    return at


def by_language(languages: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Returns `[K]` sums of `tokens`. `bincount` would ask the device how long its result is."""
    known = torch.arange(count, device=languages.device).unsqueeze(1)
    return ((languages.flatten() == known) * tokens.flatten()).sum(1)
