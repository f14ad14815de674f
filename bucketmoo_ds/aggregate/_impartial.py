"""The one direction that has the same product with all unit rows, which `imtl_g` and `config` share."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._definite import ridged_cholesky, solve_factored, times


def impartial(cosines: Tensor, nonzero: Tensor) -> Tensor:
    """Returns the weights, of sum 1 and any sign, of the shortest vector in the *affine* hull of the unit rows.

    That vector t has `<u_i, t> = ||t||^2` for all unit rows u_i: it is `cosines^-1 1 / (1' cosines^-1 1)`. Rows are
    dependent in two ways. Where some t has equal products (equal rows, say), many weights give it, and these are the
    smallest. Where none has, the affine hull contains 0 and t is 0, which weights of mixed signs make: they are the
    limit of those of rows that are nearly so. The ridge keeps their norm below about 700.

    Args:
        cosines, nonzero: as `unit_rows` returns them.

    Returns:
        `[B, K]` float64, exactly 0 where a row is not `nonzero`; 0 in a block without such a row.
    """
    on = nonzero.to(cosines.dtype)
    factor, lift = ridged_cholesky(cosines + torch.diag_embed(1.0 - on))
    matrix = cosines + torch.diag_embed(lift)
    found = solve_factored(factor, on)
    # Once more takes the ridge's error down to its square: (RIDGE / the least eigenvalue of the cosines)^2.
    found = found + solve_factored(factor, on * (on - times(matrix, found)))
    total = found.sum(-1, keepdim=True)
    return on * found / torch.where(total > 0.0, total, 1.0)
