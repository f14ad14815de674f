"""UPGrad: project every row onto the directions that harm nobody, then average."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._cone import project
from bucketmoo_ds.aggregate._scaling import positive_semidefinite, unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register

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
    """

    streams_up_to: ClassVar[int] = 16

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
                [project(some, on, *rows) for rows in zip(some.split(at_once, 1), own.split(at_once), strict=True)], 1
            )
            for some, on in zip(cosines.split(blocks), nonzero.split(blocks), strict=True)
        ]
        lengths = torch.where(nonzero, norms, mask.to(norms.dtype))
        summed = (torch.cat(projections) * lengths.unsqueeze(-1)).sum(-2) / torch.where(nonzero, norms, 1.0)
        return summed / mask.sum(-1, keepdim=True)
