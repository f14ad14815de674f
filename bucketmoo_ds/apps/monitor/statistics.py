"""Conflict statistics of a window, from the Grams and weights that its resolution needed anyway."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.conflict import GRAM_ACCURACY, cosines, share_of_conflicts
from bucketmoo_ds.apps.monitor.records import StepDetail

# MGDA gives a row of norm r among rows of norm 1 nearly all the weight and a step of norm r: at a thousandth, the block
# hardly moves for the sake of one language.
NEAR_ZERO = 1e-3


@dataclasses.dataclass(frozen=True)
class ConflictStatistics:
    """Statistics of B blocks and K languages, float64 unless said otherwise, on the device of the Gram.

    Args:
        cosine: `[B, K, K]`, the cosine of every two rows; NaN where one of them is absent or zero.
        conflict: `[B]`, the share of pairs of languages with a negative cosine (see `aggregate.conflict`), among the
            pairs that have a cosine; NaN where there is none.
        row_norm: `[B, K]`, the norms of the rows; NaN where absent.
        weights: `[B, K]`, the weights of the rows; NaN where absent.
        combined_norm: `[B]`, the norm of d, the weighted sum of the rows.
        mean_norm: `[B]`, the norm of the mean of the present rows: what averaging would have taken; NaN without one.
        descent: `[B]`, the least `<g_i, d>` over the present languages; NaN without one. To first order, a step of
            learning rate t along -d changes the loss of language i by `-t <g_i, d>`, summed over the blocks.
        descends: `[B]`, bool: whether `descent` is not negative, up to the accuracy of a Gram: on this block alone,
            no language gets worse, as where none is present.
        near_zero: `[B]`, int64: present languages whose row is shorter than a thousandth of the block's longest.
    """

    cosine: Tensor
    conflict: Tensor
    row_norm: Tensor
    weights: Tensor
    combined_norm: Tensor
    mean_norm: Tensor
    descent: Tensor
    descends: Tensor
    near_zero: Tensor

    def detail(self, languages: Sequence[str]) -> StepDetail:
        """Returns the optional part of a step record, rounded to what a reader can use.

        Raises:
            ValueError: the number of names is not K.
        """
        if len(languages) != self.weights.shape[1]:
            raise ValueError(f"{len(languages)} names of languages for weights of {self.weights.shape[1]}")
        weights = _decimals(self.weights)
        return {
            "weights": {name: [row[index] for row in weights] for index, name in enumerate(languages)},
            "cosine": _decimals(self.cosine),
            "conflict": _decimals(self.conflict),
            "near_zero": self.near_zero.tolist(),
            "descends": self.descends.tolist(),
            "combined_norm": _digits(self.combined_norm),
            "mean_norm": _digits(self.mean_norm),
        }


def conflict_statistics(gram: Tensor, mask: Tensor, weights: Tensor) -> ConflictStatistics:
    """Computes the statistics of a window.

    Args:
        gram: `[B, K, K]` float64, the Gram of the rows of every block. What stands in rows and columns of absent
            languages is never read.
        mask: `[B, K]` bool, the languages that are present in a block.
        weights: `[B, K]`, the weights that multiply these rows; not read where absent.

    Raises:
        ValueError: shapes or types that do not go together.
    """
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.dtype != torch.float64:
        raise ValueError(f"gram: expected float64 [B, K, K], got {gram.dtype} {list(gram.shape)}")
    for name, value in (("mask", mask), ("weights", weights)):
        if value.shape != gram.shape[:2]:
            raise ValueError(f"{name}: expected {list(gram.shape[:2])} as gram has it, got {list(value.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")
    nan = gram.new_tensor(math.nan)
    pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
    G = torch.where(pairs, gram, 0.0)
    w = torch.where(mask, weights.double(), 0.0)
    squares = G.diagonal(dim1=1, dim2=2).clamp(min=0)
    norm = squares.sqrt()
    cosine = cosines(G)
    products = torch.einsum("bij,bj->bi", G, w)
    present = mask.sum(dim=1)
    descent = torch.where(mask, products, math.inf).amin(dim=1)
    descent = torch.where(present > 0, descent, nan)
    longest = squares.amax(dim=1)
    return ConflictStatistics(
        cosine=cosine,
        conflict=share_of_conflicts(cosine),
        row_norm=torch.where(mask, norm, nan),
        weights=torch.where(mask, weights.double(), nan),
        combined_norm=(w * products).sum(dim=1).clamp(min=0).sqrt(),
        mean_norm=G.sum(dim=(1, 2)).clamp(min=0).sqrt() / torch.where(present > 0, present.double(), nan),
        descent=descent,
        descends=(descent >= -GRAM_ACCURACY * longest * w.abs().sum(dim=1)) | (present == 0),
        near_zero=(mask & (norm <= NEAR_ZERO * longest.sqrt().unsqueeze(1))).sum(dim=1),
    )


def _decimals(values: Tensor) -> list:
    return values.round(decimals=5).tolist()


def _digits(values: Tensor) -> list[float | None]:
    return [float(f"{value:.6g}") for value in values.tolist()]
