"""The documents of a forward pass: which tokens of a packed sequence attend to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.data.attention import Attention
from bucketmoo_ds.transfer import to_device

# exp(-1e4) is 0 in every format, float64 included.
_HIDDEN = -1e4


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a micro-batch.

    Args:
        numbers: `[batch, sequence]` int64, for each token that of its document, from 0 through the whole micro-batch
            without a gap. Hidden tokens have any.
        told_by: the input that tells; empty where none does, and each sequence is a document.
        unread: the inputs that may tell and that the model does not read, and why; empty where there are none.
        hidden: `[batch, sequence]`, the tokens that nobody attends to; `None` where that is not told.
    """

    numbers: Tensor
    told_by: str = ""
    unread: str = ""
    hidden: Tensor | None = None


def documents_of(
    inputs: Mapping[str, Any], shape: tuple[int, int], device: torch.device, attention: Attention
) -> Documents:
    """Returns the documents of a micro-batch. The host waits for no device.

    Args:
        inputs: the model's, by name.
        shape: `(batch, sequence)`.
        device: where they lie.
        attention: what the model reads of them.
    """
    rows = torch.arange(shape[0], device=device).unsqueeze(1).expand(shape)
    if attention.has_decoder(inputs):  # its masks are the encoder's
        return Documents(rows)
    unread: list[str] = []
    for name, starts_of in _STARTS.items():
        told = inputs.get(name)
        if told is None or (name == "attention_mask" and (not isinstance(told, Tensor) or told.dim() == 2)):
            continue
        why_not = attention.why_not(name, inputs, shape[0])
        starts = starts_of(told, shape, device, attention) if not why_not else None
        if starts is not None:
            return Documents(_numbered(starts.expand(shape)), name, "; ".join(unread))
        unread.append(f"{name}: {why_not or f'does not fit {list(shape)} tokens'}")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == shape:
        mask = onto(mask, device).long()
        return Documents(_numbered_by_value(mask), "attention_mask", "; ".join(unread), mask == 0)
    if mask is not None and not isinstance(mask, Tensor) and inputs.get("seq_idx") is None:
        unread.append("attention_mask: it does not say which documents it keeps apart; pass seq_idx as well")
    return Documents(rows, unread="; ".join(unread))


def _by_visibility(mask: Tensor, shape: tuple[int, int], device: torch.device, attention: Attention) -> Tensor | None:
    """A document starts where nobody from there on attends to anybody before, or the other way round.

    Args:
        mask: `[batch or 1, heads, sequence, sequence]` or without the heads; a token attends where it is true, or, in
            floating point, where it is not far below 0.
    """
    batch, length = shape
    if mask.dim() not in (3, 4) or mask.shape[-2:] != (length, length) or mask.shape[0] not in (1, batch):
        return None
    mask = onto(mask, device)
    visible = mask > _HIDDEN if mask.is_floating_point() else mask != 0
    visible = visible.any(1) if visible.dim() == 4 else visible
    here, some = torch.arange(length, device=device), visible.any(-1)
    visible = visible.to(torch.uint8)  # `argmax` takes no truth values, and gives the first of equal ones
    first = torch.where(some, visible.argmax(-1), here).minimum(here)
    last = torch.where(some, length - 1 - visible.flip(-1).argmax(-1), here).maximum(here)
    backward = first.flip(-1).cummin(-1).values.flip(-1) >= here
    return backward & (last.cummax(-1).values.roll(1, -1) < here)


def _by_lengths(told: Any, shape: tuple[int, int], device: torch.device, attention: Attention) -> Tensor | None:
    """Documents end at the sums of their lengths, `[documents + 1]` with a leading 0."""
    bounds = onto(torch.as_tensor(told), device)
    if bounds.dim() != 1:
        return None
    return _changes(torch.bucketize(torch.arange(shape[1], device=device), bounds.long(), right=True).unsqueeze(0))


def _by_number(told: Any, shape: tuple[int, int], device: torch.device, attention: Attention) -> Tensor | None:
    numbers = _matching(told, shape, device)
    return None if numbers is None else _changes(numbers)


def _by_position(told: Any, shape: tuple[int, int], device: torch.device, attention: Attention) -> Tensor | None:
    positions = _matching(told, shape, device)
    if positions is None:
        return None
    if attention.flash:
        return positions == positions.amin()
    return _changes(positions - torch.arange(shape[1], device=device))


# In this order: what says more, first.
_STARTS = {
    "attention_mask": _by_visibility,
    "cu_seq_lens_q": _by_lengths,
    "cu_seqlens": _by_lengths,
    "seq_idx": _by_number,
    "position_ids": _by_position,
}


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; the host waits for it only if that is the host."""
    if tensor.device.type == "cpu":
        return to_device(tensor, tensor.dtype, device)
    return tensor.to(device, non_blocking=device.type != "cpu")


def _matching(told: Any, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """Returns `[batch or 1, sequence]` numbers; `None` for anything else."""
    if not isinstance(told, Tensor) or told.shape not in (torch.Size(shape), torch.Size((1, shape[1]))):
        return None
    return onto(told, device).long()


def _changes(numbers: Tensor) -> Tensor:
    return torch.diff(numbers, dim=-1, prepend=numbers[..., :1]) != 0


def _numbered(starts: Tensor) -> Tensor:
    """Numbers documents from where they start. Every sequence starts one."""
    first = torch.arange(starts.shape[1], device=starts.device) == 0
    return ((starts | first).flatten().cumsum(0) - 1).view(starts.shape)


def _numbered_by_value(values: Tensor) -> Tensor:
    """Numbers documents by `[batch, sequence]` values, where 0 is none. Tokens of a sequence with one value are of one
    document, also where others stand between: so a mask of 0 and 1 tells of a single one."""
    length = values.shape[1]
    here = torch.arange(length, device=values.device).expand(values.shape)
    kinds = values.clamp(0, length)
    leaders = values.new_full((len(values), length + 1), length).scatter_reduce(1, kinds, here, "amin").gather(1, kinds)
    starts = (leaders == here) & (kinds > 0)
    numbers = starts.flatten().cumsum(0).view(values.shape) - 1 + (starts.cumsum(1) == 0)  # padding before: the next
    return torch.minimum(numbers, starts.sum() - 1).clamp(min=0).gather(1, leaders)
