"""UPGrad: project every row onto the directions that harm nobody, then average."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.aggregate._scaling import positive_semidefinite, unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register

# The length of the row that is projected, beside the others' 1: a power of two, so that scaling takes no digits, and as
# short as a row may be that does not count as zero (1e-15 of the longest).
SHORT = 2.0**-49
# Entries of the Grams that are worked on at once, 32 MB, so that many blocks of many languages fit into memory.
AT_ONCE = 1 << 22


@register("upgrad")
@dataclasses.dataclass(frozen=True)
class UPGrad(Aggregator):
    """Unconflicting projection of gradients (Quinton & Rey, Jacobian Descent for Multi-Objective Optimization, 2024).

    Row i is replaced by its projection onto the cone `{d : <g_j, d> >= 0 for all j}`, whose weights are
    `argmin {v @ gram @ v : v >= e_i}` (proposition 1 there); the block's weights are the mean of these over i. The
    combined row harms no language to first order. They are TorchJD's weights with its default preference vector, but
    for its regularisation (`reg_eps`), which is 1e-4 of the trace there.

    Each projection is a min-norm problem: `v_i = 1` at the solution, so the projection is the shortest of all
    `g_i + sum_j v_j g_j`. Beside a row i that is very short the others' weights in the hull are very small, whatever
    their v: that shortest vector is the one of the hull of `SHORT g_i` and the other g_j, but for a factor. The op's
    ridge makes the smallest v the solution where any number of them is as good (a Pareto-stationary block).
    """

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        # The cone knows directions only: the unit rows are projected, and the projections scaled back.
        cosines, norms, nonzero = unit_rows(gram, mask)
        cosines = positive_semidefinite(cosines, nonzero)  # else some v would go on shortening the row for ever
        languages = gram.shape[-1]
        own = torch.eye(languages, dtype=torch.bool, device=gram.device)
        at_once = max(1, AT_ONCE // languages**2)
        blocks = max(1, at_once // languages)
        projections = [
            torch.cat(
                [_project(some, on, *rows) for rows in zip(some.split(at_once, 1), own.split(at_once), strict=True)], 1
            )
            for some, on in zip(cosines.split(blocks), nonzero.split(blocks), strict=True)
        ]
        lengths = torch.where(nonzero, norms, mask.to(norms.dtype))
        summed = (torch.cat(projections) * lengths.unsqueeze(-1)).sum(-2) / torch.where(nonzero, norms, 1.0)
        return summed / mask.sum(-1, keepdim=True)


def _project(cosines: Tensor, on: Tensor, of_rows: Tensor, own: Tensor) -> Tensor:
    """Returns the projections of R of the unit rows `on` as weights `[B, R, K]` over all of them.

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
