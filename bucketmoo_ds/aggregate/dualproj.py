"""DualProj: project the mean row onto the directions that harm nobody."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._cone import project
from bucketmoo_ds.aggregate._definite import times
from bucketmoo_ds.aggregate._scaling import positive_semidefinite, unit_rows
from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.aggregate.mean import uniform

# A mean row shorter than this times the mean of the norms is 0: its square has only rounding left.
CANCELLED = 1e-7


@register("dualproj")
@dataclasses.dataclass(frozen=True)
class DualProj(Aggregator):
    """The mean row, projected onto the cone `{d : <g_j, d> >= 0 for all j}` (Lopez-Paz & Ranzato, Gradient Episodic
    Memory for Continual Learning, NeurIPS 2017, equation 11; as a rule, Quinton & Rey, Jacobian Descent, 2024).

    The weights are `argmin {v @ gram @ v : v >= 1/K}`: averaging, and more of those rows that the mean would harm.
    Where it harms none it is averaging. Where UPGrad projects each row and takes the mean, here the loud languages
    decide what is projected. TorchJD's weights, but for its regularisation.

    Where the mean row is 0 its weights stay 1/K. A zero row harms nobody and gets 1/K. Where rows nearly cancel, a
    weight may be large: one row has to be added often to turn the mean by a little.

    Guarantee by block: `<g_i, d> >= 0` for all languages, and `<g_0, d> = ||d||^2` for the mean row g_0. One problem of
    `min_norm` with K + 1 rows.
    """

    streams_up_to: ClassVar[int] = 32

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        cosines, norms, nonzero = unit_rows(gram, mask)
        cosines = positive_semidefinite(cosines, nonzero)
        average = uniform(mask)
        parts = average * norms
        to_rows = times(cosines, parts)
        length = (parts * to_rows).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
        moves = length > CANCELLED * parts.sum(-1, keepdim=True)
        length = torch.where(moves, length, 1.0)
        to_mean = torch.where(moves, to_rows / length, 0.0).unsqueeze(-2)
        mean = torch.cat([to_mean, torch.ones_like(to_mean[..., :1])], -1)  # its cosines with the rows, and with itself
        both = torch.cat([torch.cat([cosines, to_mean.mT], -1), mean], -2)
        own = torch.zeros_like(mean[0], dtype=torch.bool)
        own[:, -1] = True
        added = project(both, torch.cat([nonzero, moves], -1), mean, own)[:, 0, :-1]
        return average + length * torch.where(moves, added, 0.0) / torch.where(nonzero, norms, 1.0)
