"""The one equation of `nash_mtl` and `fairgrad`: every language gains by a power of what it weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._definite import solve_factored, times
from bucketmoo_ds.aggregate._scaling import ROUNDING, positive_semidefinite, unit_rows

# Added to the cosines, twice what `positive_semidefinite` may lack: the weights of a Pareto-stationary block would grow
# for ever, and grow to some millions. d is then 0 but for the ridge's root, 5e-7 of the sizes of its parts.
RIDGE = 2.0 * ROUNDING
# Newton steps. With power 1, rows of any norms that are not nearly dependent need 8 at most up to K = 16, and a block
# that is Pareto stationary 16 until d is 1e-8 of its parts; other powers see the norms, and need 30 for norms of 1e-3
# to 1e3.
STEPS = {1.0: 16}
MOST_STEPS = 32


def fair(gram: Tensor, mask: Tensor, power: float) -> Tensor:
    """Returns the weights w > 0 with `(gram @ w)_i = f w_i^-power`, f such that d's parts are as long as the mean's.

    Up to f, w minimises the convex `w @ gram @ w / 2 - sum_i w_i^(1 - power) / (1 - power)`, a logarithm for power 1
    (Boyd & Vandenberghe, Convex Optimization, 2004, section 9.5: Newton's method). In terms of the unit rows, with
    `y_i = w_i n_i`, it is `cosines @ y = n^(power - 1) y^-power`, and relative to y the Hessian is the identity and
    something positive. Before each step y is scaled to the best of its multiples; a step goes no further than lets all
    y stay positive.

    Args:
        gram: `[B, K, K]` float64.
        mask: `[B, K]` bool.
        power: above 0.

    Returns:
        `[B, K]` float64 with `sum_i w_i n_i = mean_i n_i`, as averaging has it; 0 for zero rows, which have no such w.
        A Pareto-stationary block has no solution: its weights then are about those of a convex combination that is 0.
    """
    cosines, norms, nonzero = unit_rows(gram, mask)
    lengths = torch.where(nonzero, norms, 1.0)
    matrix = positive_semidefinite(cosines, nonzero) + torch.diag_embed(torch.where(nonzero, RIDGE, 1.0))
    unit = torch.diag_embed(torch.full_like(norms, power))
    price = lengths ** (power - 1.0)
    y = price ** (1.0 / (1.0 + power))
    for _ in range(STEPS.get(power, MOST_STEPS)):
        gains = y * times(matrix, y)
        wanted = price * y ** (1.0 - power)
        longer = (wanted.sum(-1, keepdim=True) / gains.sum(-1, keepdim=True)) ** (1.0 / (1.0 + power))
        y, gains, wanted = y * longer, gains * longer.square(), wanted * longer ** (1.0 - power)
        root = wanted.sqrt()
        relative = y / root
        hessian = matrix * relative.unsqueeze(-1) * relative.unsqueeze(-2) + unit
        factor, failed = torch.linalg.cholesky_ex(hessian)  # of eigenvalues above `power`, but for rounding
        step = torch.where(failed.unsqueeze(-1) > 0, 0.0, solve_factored(factor, (wanted - gains) / root) / root)
        y = y * (1.0 + step / (1.0 + (-step).amax(-1, keepdim=True).clamp(min=0.0)))
    y = torch.where(nonzero, y, 0.0)
    total = y.sum(-1, keepdim=True)
    mean = norms.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return mean * y / torch.where(total > 0.0, total, 1.0) / lengths
