"""PCGrad: take from every row what conflicts with the others, one after another in random order."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.transfer import to_device


@register("pcgrad")
@dataclasses.dataclass(frozen=True)
class PCGrad(Aggregator):
    """Projecting conflicting gradients (Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, alg. 1).

    Row i meets the others in random order; with each g_j it conflicts with, it loses its part along g_j. The paper
    sums the K results; here they are averaged, so that blocks without a conflict get plain averaging. All blocks of a
    call share one order a language, which depends on the generator and K only, not on B.
    """

    streams_up_to: ClassVar[int] = 16

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        num_languages = mask.shape[-1]
        squares = gram.diagonal(dim1=-2, dim2=-1)
        usable = mask & (squares > 0.0)
        divisor = torch.where(usable, squares, 1.0)
        each = torch.arange(num_languages, device=gram.device)
        # projected[b, i] holds the weights, over the rows of block b, of what is left of row i.
        projected = torch.eye(num_languages, dtype=gram.dtype, device=gram.device).repeat(len(gram), 1, 1)
        for others in orders(num_languages, generator, gram.device).T:
            product = (projected * gram.index_select(1, others)).sum(-1)
            conflict = usable.index_select(1, others) & (product < 0.0) & (others != each)
            part = torch.where(conflict, product / divisor.index_select(1, others), 0.0)
            index = others[:, None].expand(len(gram), -1, 1)
            projected.scatter_(-1, index, projected.gather(-1, index) - part.unsqueeze(-1))
        return (projected * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True)


def orders(num_languages: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Returns an order of all languages for each, `[K, K]` int64, drawn where the generator is."""
    draws = [
        torch.randperm(num_languages, generator=generator, device=generator.device) for _ in range(num_languages)
    ]
    return to_device(torch.stack(draws), torch.int64, device)
