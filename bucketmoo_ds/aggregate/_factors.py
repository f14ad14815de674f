"""What rows are multiplied by before a rule sees them: `normalize` and `preference`, for all rules alike."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._scaling import ZERO_ROW
from bucketmoo_ds.aggregate.mean import uniform
from bucketmoo_ds.config import BY_LOSS


def factors(
    gram: Tensor, mask: Tensor, normalize: str, losses: Tensor | None, preference: Tensor | None
) -> Tensor | None:
    """Returns the factors `[B, K]` of the rows of each block: D N, where D = diag(preference), brought to mean 1, and N
    divides each row by its size, times the median of the sizes (of two middle ones the lower). `None`: 1 each.

    A size is the row's norm (`l2`), its language's loss (`loss`, Sener & Koltun's code: `loss`) or their product
    (`loss_l2`; there: `loss+`). A size of 0 has no such factor: it does not count for the median, and its row stays.

    Args:
        gram: `[B, K, K]`, 0 where unmasked; the longest row of a block has norm 1.
        mask: `[B, K]` bool.
        losses: `[B, K]`, finite; for `loss` and `loss_l2`.
        preference: `[K]`, positive.
    """
    preferred = None if preference is None else mean_one(mask, preference)
    if normalize == "none":
        return preferred
    size = torch.ones_like(gram[..., 0])
    if normalize != "loss":
        size = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    if normalize in BY_LOSS:
        assert losses is not None
        loss = torch.where(mask, losses, 0.0).clamp(min=0.0)
        size = size * (loss / loss.amax(-1, keepdim=True).clamp(min=torch.finfo(loss.dtype).tiny))
    nonzero = mask & (size > ZERO_ROW)
    ascending = torch.where(nonzero, size, torch.inf).sort(-1).values
    middle = ascending.gather(-1, (nonzero.sum(-1, keepdim=True) - 1).clamp(min=0) // 2)
    even = torch.where(nonzero, middle / torch.where(nonzero, size, 1.0), 1.0)
    return even if preferred is None else even * preferred


def mean_one(mask: Tensor, preference: Tensor | None) -> Tensor:
    """Returns the preference `[B, K]` divided by its mean over the languages of the mask; 1 without one."""
    if preference is None:
        return torch.ones(mask.shape, dtype=torch.float64, device=mask.device)
    total = (mask * preference).sum(-1, keepdim=True)
    return preference * mask.sum(-1, keepdim=True) / torch.where(total > 0.0, total, 1.0)


def averaging(mask: Tensor, preference: Tensor | None) -> Tensor:
    """Returns the weights `[B, K]` of averaging: each language's preference, divided by their sum."""
    even = uniform(mask)
    return even if preference is None else even * mean_one(mask, preference)
