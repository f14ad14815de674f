"""Aligned-MTL: the rows turned into orthogonal ones of equal norm, as near to them as can be, then averaged."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate._spectrum import spectrum
from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.aggregate.conflict import GRAM_ACCURACY
from bucketmoo_ds.aggregate.mean import uniform


@register("aligned_mtl")
@dataclasses.dataclass(frozen=True)
class AlignedMTL(Aggregator):
    """Independent component alignment (Senushkin et al., CVPR 2023, algorithm 1).

    With the Gram's eigenvalues l and eigenvectors V, `w = sqrt(l_min) V l^(-1/2) V' 1/K`: d is the mean of orthogonal
    rows whose common squared norm is l_min, the least eigenvalue. Equal rows get 1/K each, orthogonal rows of equal
    norm averaging. No weight is larger than 1 in absolute value; some may be negative.

    Eigenvalues below 2e-6 of the largest are noise, and count as 0: a direction in which all rows together are shorter
    than about a thousandth of the longest is left out, which a whole language of such short rows is. l_min is the least
    of the others. So d's length is that of the *weakest* direction of the block, jumps where one falls below that mark,
    and follows the noise where languages are nearly dependent: `rescale = "mean"` is the way out.

    Guarantee by block: none for a language (`<g_i, d>` may be negative), but the mean loss falls: `<g_0, d> >= 0` for
    the mean row g_0. The eigenvectors take about 10 K^3 (5 + log2 K) operations a block.
    """

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        cosines, norms, _ = unit_rows(gram, mask)
        values, vectors = spectrum(cosines * norms.unsqueeze(-1) * norms.unsqueeze(-2))
        kept = values > GRAM_ACCURACY * values.amax(-1, keepdim=True).clamp(min=1.0)  # the longest row is 1
        least = torch.where(kept, values, torch.inf).amin(-1, keepdim=True)
        scale = torch.where(kept, (least / torch.where(kept, values, 1.0)).sqrt(), 0.0)
        along = scale * (vectors * uniform(mask).unsqueeze(-2)).sum(-1)
        return mask * (vectors * along.unsqueeze(-1)).sum(-2)
