"""Unit rows: the same block with every row scaled to norm 1, the form in which badly scaled Grams solve accurately."""

from __future__ import annotations

import torch
from torch import Tensor

# A row shorter than this times the longest one is zero: float64 cannot tell its products with that one from rounding.
ZERO_ROW = 1e-15
# What rounding to float64 may take from an eigenvalue of the cosines.
ROUNDING = 1e-13


def unit_rows(gram: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a Gram into the cosines of its rows and their norms.

    Args:
        gram: `[B, K, K]` float64, finite where unmasked.
        mask: `[B, K]` bool, the languages that count.

    Returns:
        cosines: `[B, K, K]` float64, positive semidefinite, 0 in the rows and columns of other languages.
        norms: `[B, K]` float64, divided by the block's largest; exactly 0 where the row is zero or masked.
        nonzero: `[B, K]` bool, unmasked and not zero.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    norms = torch.where(mask, diagonal, torch.zeros_like(diagonal)).clamp(min=0.0).sqrt()
    largest = norms.amax(-1, keepdim=True)
    nonzero = norms > ZERO_ROW * largest
    divisor = torch.where(nonzero, norms, torch.ones_like(norms))
    both = nonzero.unsqueeze(-1) & nonzero.unsqueeze(-2)
    cosines = torch.where(both, gram / divisor.unsqueeze(-1) / divisor.unsqueeze(-2), torch.zeros_like(gram))
    relative = torch.where(nonzero, norms / torch.where(largest > 0, largest, torch.ones_like(largest)), 0.0)
    return _positive_semidefinite(cosines, nonzero), relative, nonzero


def _positive_semidefinite(cosines: Tensor, nonzero: Tensor) -> Tensor:
    """Lifts the diagonal by what a Gram summed in float32 lacks: such a Gram of dependent rows has eigenvalues of
    about -1e-7, and no convex problem belongs to it."""
    identity = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    probe = cosines + torch.diag_embed(torch.where(nonzero, ROUNDING, 1.0).to(cosines.dtype))
    failed = torch.linalg.cholesky_ex(probe).info > 0
    if not bool(failed.any()):
        return cosines
    lift = torch.zeros_like(cosines[:, 0, 0])
    lift[failed] = -torch.linalg.eigvalsh(cosines[failed])[:, 0].clamp(max=0.0)
    return cosines + lift[:, None, None] * identity * nonzero.unsqueeze(-1)
