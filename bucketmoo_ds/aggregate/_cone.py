"""The projection of rows onto the cone of the directions that harm no language, which `upgrad` and `dualproj` share."""

from __future__ import annotations

import torch
from torch import Tensor

from bucketmoo_ds import ops

# The length of the row that is projected, beside the others' 1: a power of two, so that scaling takes no digits, and as
# short as a row may be that does not count as zero (1e-15 of the longest).
SHORT = 2.0**-49


def project(cosines: Tensor, on: Tensor, of_rows: Tensor, own: Tensor) -> Tensor:
    """Returns the projections of R of the unit rows `on` as weights `[B, R, K]` over all of them.

    The projection of row i has the weights `argmin {v @ gram @ v : v >= e_i}`. That is a min-norm problem: `v_i = 1` at
    the solution, so the projection is the shortest of all `g_i + sum_j v_j g_j`. Beside a row i that is very short the
    others' weights in the hull are very small, whatever their v: that shortest vector is the one of the hull of
    `SHORT g_i` and the other g_j, but for a factor. The op's ridge makes the smallest v the solution where any number
    of them is as good (a Pareto-stationary block).

    Args:
        cosines, on: `[B, K, K]` and `[B, K]`, as `unit_rows` returns them.
        of_rows: `[B, R, K]`, the cosines of the rows to project.
        own: `[R, K]` bool, where each of them is.
    """
    length = torch.where(own, SHORT, 1.0).to(cosines.dtype)
    problems = cosines.unsqueeze(1) * (length.unsqueeze(-1) * length.unsqueeze(-2))
    # A row that conflicts with no other is its own projection; its problem is one without a choice.
    conflicts = (of_rows < 0.0).any(-1, keepdim=True)
    mask = on.unsqueeze(1) & (conflicts | own)
    weights = ops.min_norm(problems.flatten(0, 1), mask.flatten(0, 1))[0].unflatten(0, mask.shape[:2])
    scaled = weights / (weights * own).sum(-1, keepdim=True) * (length / SHORT)
    # Of two rows the op knows one's share by what the other leaves, and SHORT leaves no digits.
    two = torch.where(own, 1.0, -of_rows)
    return torch.where(conflicts, torch.where(on.sum(-1)[:, None, None] == 2, two, scaled), own.to(cosines.dtype))
