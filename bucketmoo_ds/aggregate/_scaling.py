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
        cosines: `[B, K, K]` float64, 0 in the rows and columns of other languages. A Gram that was summed in float32
            may have eigenvalues of about -1e-7, and so have they.
        norms: `[B, K]` float64, divided by the block's largest; exactly 0 where the row is zero or masked.
        nonzero: `[B, K]` bool, unmasked and not zero.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    norms = torch.where(mask, diagonal, 0.0).clamp(min=0.0).sqrt()
    largest = norms.amax(-1, keepdim=True)
    nonzero = norms > ZERO_ROW * largest
    divisor = torch.where(nonzero, norms, 1.0)
    both = nonzero.unsqueeze(-1) & nonzero.unsqueeze(-2)
    cosines = torch.where(both, gram / divisor.unsqueeze(-1) / divisor.unsqueeze(-2), 0.0)
    return cosines, torch.where(nonzero, norms / torch.where(largest > 0.0, largest, 1.0), 0.0), nonzero


def positive_semidefinite(cosines: Tensor, nonzero: Tensor) -> Tensor:
    """Lifts the diagonal by what a Gram summed in float32 lacks: such a Gram of dependent rows has eigenvalues of
    about -1e-7, and no convex problem belongs to it.

    Args:
        cosines, nonzero: as `unit_rows` returns them.

    Returns:
        `[B, K, K]` float64: the same where it is semidefinite, lifted by at most twice what it lacks elsewhere.
    """
    least = torch.full_like(cosines[:, :1, 0], ROUNDING)
    for step in (32, 16, 8, 4, 2, 1):  # bisection for the least power of two that will do
        tried = torch.where(nonzero, least * 2.0 ** (step - 1), 1.0)
        failed = torch.linalg.cholesky_ex(cosines + torch.diag_embed(tried)).info > 0
        least = torch.where(failed.unsqueeze(-1), least * 2.0**step, least)
    return cosines + torch.diag_embed(torch.where(nonzero & (least > ROUNDING), least, 0.0))
