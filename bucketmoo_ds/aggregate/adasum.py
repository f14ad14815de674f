"""Adasum: pairs of rows, orthogonal ones summed and parallel ones averaged, up a tree."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register


@register("adasum")
@dataclasses.dataclass(frozen=True)
class Adasum(Aggregator):
    """Adaptive summation (Maleki et al., Scaling Distributed Training with Adaptive Summation, MLSys 2021, section 3).

    `(1 - <a, b> / (2 ||a||^2)) a + (1 - <a, b> / (2 ||b||^2)) b`: the sum where two rows are orthogonal, their mean
    where they are equal. Neighbours among the present languages are combined, then neighbours among the results, and so
    on; one without a neighbour goes on alone. So the result depends on the order of the languages, but is symmetric in
    two.

    Its own norm lies between averaging's and the sum's: orthogonal rows get weight 1 each, not 1/K, so that d can be K
    times as long as the mean. Tune the rate, or `rescale = "mean"`.

    A zero row changes nothing; a short one gets a weight up to the ratio of the norms. Nothing is guaranteed by block:
    the rule was made for batches of one objective. K operations on rows of a `[K, K]` matrix."""

    streams_up_to: ClassVar[int] = 16

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        count = mask.shape[-1]
        # Present languages first, in their order: a masked one is a zero row at the end, which changes nothing.
        order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
        places = order.unsqueeze(-1).expand_as(gram)
        gram = gram.gather(1, places).gather(2, places.mT)
        # node[b, i] are the weights of the rows in the i-th result.
        node = torch.eye(count, dtype=gram.dtype, device=gram.device).expand_as(gram)
        while node.shape[1] > 1:
            node = torch.nn.functional.pad(node, (0, 0, 0, node.shape[1] % 2))
            left, right = node[:, 0::2], node[:, 1::2]
            of_left = (gram.unsqueeze(1) * left.unsqueeze(-2)).sum(-1)
            of_right = (gram.unsqueeze(1) * right.unsqueeze(-2)).sum(-1)
            product = (of_left * right).sum(-1, keepdim=True)
            node = _share(product, (of_left * left).sum(-1, keepdim=True)) * left + (
                _share(product, (of_right * right).sum(-1, keepdim=True)) * right
            )
        return mask * torch.zeros_like(node[:, 0]).scatter(-1, order, node[:, 0])


def _share(product: Tensor, square: Tensor) -> Tensor:
    """Returns what is left of a row whose product with its neighbour and whose squared norm these are."""
    nonzero = square > 0.0
    return 1.0 - torch.where(nonzero, product, 0.0) / torch.where(nonzero, 2.0 * square, 1.0)
