"""Linear systems with the cosines of rows, which should be positive semidefinite and, summed in float32, may not be."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.conflict import GRAM_ACCURACY

# Added to the diagonal, more than rounding takes from an eigenvalue: a row that lies in the span of the others, but for
# this squared share of its length, then counts as lying in it.
RIDGE = GRAM_ACCURACY


def ridged_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the Cholesky factor of `matrix + RIDGE`, whose diagonal is lifted further where it must be.

    A pivot is made as large as it takes to be the ridge at least and to keep the factor's entries within 1. A matrix
    that is semidefinite is left as it is (Gill, Murray & Wright, Practical Optimization, 1981, section 4.4.2.2). All
    operations are elementwise, so that a block's bits do not depend on the others of the batch.

    Args:
        matrix: `[B, K, K]` float64 whose largest diagonal entry is about 1.

    Returns:
        factor: `[B, K, K]`, lower triangular, of the lifted matrix.
        lift: `[B, K]`, what the diagonal was lifted by beside the ridge, 0 or more up to rounding.
    """
    ridge = torch.diag_embed(torch.full_like(matrix[..., 0], RIDGE))
    left = (
        (matrix + ridge).permute(1, 2, 0).contiguous()
    )  # the blocks last: each operation takes what lies side by side
    factor, lifts = torch.zeros_like(left), []
    for k in range(len(left)):
        own, below = left[k, k], left[k + 1 :, k]
        pivot = torch.cat([own.abs().unsqueeze(0), below.square()]).amax(0).clamp(min=RIDGE)
        lifts.append(pivot - own)
        factor[k, k] = pivot.sqrt()
        column = below / pivot.sqrt()
        factor[k + 1 :, k] = column
        left[k + 1 :, k + 1 :] -= column.unsqueeze(1) * column
    return factor.permute(2, 0, 1).contiguous(), torch.stack(lifts, -1)


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """Returns `[B, K]`, the solutions of `factor @ factor.T @ x = right` `[B, K]`."""
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the product of each `[K, K]` with its `[K]`, summed in one fixed way whatever the batch."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)
