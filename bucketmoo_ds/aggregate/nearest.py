"""The positive semidefinite matrix nearest to a Gram whose entries are estimates, and which may be indefinite."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._spectrum import spectrum

# By how much of a bound of the eigenvalues matrices are lifted, so that the least one is well above 0: a Cholesky
# factor then loses no digits.
LIFT = 1.5
# The lift brings eigenvalues together. Of 3,000 matrices of 4 to 64 rows, some nearly of low rank, the worst was wrong
# by 1e-6 of its largest eigenvalue without these, 1e-10 with one, and 7e-14 with two.
MORE_SWEEPS = 2


def nearest_semidefinite(matrix: Tensor) -> Tensor:
    """Returns the nearest positive semidefinite matrices, in Frobenius' norm: eigenvalues below 0 become 0 (Higham,
    Linear Algebra and its Applications 103, 1988, theorem 2.1).

    The part below 0 is taken away, so that a semidefinite matrix keeps its digits, up to 1e-13 of its largest
    eigenvalue. A matrix that is not finite is returned as it is. The device is asked nothing.

    Args:
        matrix: `[B, K, K]` float64, symmetric.
    """
    count = matrix.shape[-1]
    finite = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    sound = torch.where(finite, matrix, 0.0)
    bound = sound.abs().sum(-1).amax(-1)[:, None, None]  # Gershgorin's
    bound = torch.where(bound > 0.0, bound, 1.0)
    identity = torch.eye(count, dtype=matrix.dtype, device=matrix.device)
    values, vectors = spectrum((sound / bound + LIFT * identity) / (1.0 + LIFT), MORE_SWEEPS)
    # An odd number of rows has an eigenvalue more, of no vector.
    values = values * (1.0 + LIFT) - LIFT
    missing = vectors.unsqueeze(-1) * (-values).clamp(min=0.0)[..., None, None] * vectors.unsqueeze(-2)
    return torch.where(finite, sound + missing.sum(1) * bound, matrix)
