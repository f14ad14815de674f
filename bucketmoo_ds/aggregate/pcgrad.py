"""PCGrad: take from every row what conflicts with the others, one after another in random order."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register


@register("pcgrad")
@dataclasses.dataclass(frozen=True)
class PCGrad(Aggregator):
    """Projecting conflicting gradients (Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, alg. 1).

    Row i meets the others in random order; with each g_j it conflicts with, it loses its part along g_j. The paper
    sums the K results; here they are averaged, so that blocks without a conflict get plain averaging. All blocks of a
    call share one order a language, which depends on the generator and K only, not on B.
    """

    cheap = True

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        num_blocks, num_languages = mask.shape
        device = generator.device
        draw = (torch.randperm(num_languages, generator=generator, device=device) for _ in range(num_languages))
        order = torch.stack(list(draw)).to(gram.device)
        each = torch.arange(num_languages, device=gram.device)
        squares = gram.diagonal(dim1=-2, dim2=-1)
        usable = mask & (squares > 0.0)
        divisor = torch.where(usable, squares, 1.0)
        # projected[b, i] holds the weights, over the rows of block b, of what is left of row i.
        projected = torch.eye(num_languages, dtype=gram.dtype, device=gram.device).repeat(num_blocks, 1, 1)
        for others in order.T:
            product = (projected * gram[:, others]).sum(-1)
            conflict = usable[:, others] & (product < 0.0) & (others != each)
            projected[:, each, others] -= torch.where(conflict, product / divisor[:, others], 0.0)
        return (projected * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True)
