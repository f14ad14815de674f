"""When two languages conflict: the cosine of their rows is negative, by more than a Gram's rounding.

Rows of languages that share no token are orthogonal on an embedding, and the sign of their product is noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# A Gram of bfloat16 rows is right to about 2e-6 of its diagonal; below that, a product's sign says nothing.
GRAM_ACCURACY = 2e-6


def cosines(gram: Tensor) -> Tensor:
    """Returns the cosine of every two rows, `[B, K, K]` as the Grams; NaN where one of them is zero."""
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    lengths = norm.unsqueeze(2) * norm.unsqueeze(1)
    return torch.where(lengths > 0, (gram / lengths).clamp(-1, 1), math.nan)


def conflicts(cosine: Any) -> Any:
    """Returns which of some cosines, a tensor or an array, are conflicts, as bool of their shape."""
    return cosine < -GRAM_ACCURACY


def share_of_conflicts(cosine: Tensor) -> Tensor:
    """Returns the share of conflicts among the pairs that have a cosine, `[B]` float64 of `[B, K, K]`; or NaN."""
    pairs = torch.ones_like(cosine, dtype=torch.bool).triu(diagonal=1) & cosine.isfinite()
    # 0 / 0 is the NaN that says "no pair".
    return (conflicts(cosine) & pairs).sum(dim=(1, 2)).double() / pairs.sum(dim=(1, 2)).double()
