"""GradVac: PCGrad with a target for every pair of languages, the cosine that they used to have."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._scaling import unit_rows
from bucketmoo_ds.aggregate.base import State, Stateful, check_number, register
from bucketmoo_ds.aggregate.conflict import GRAM_ACCURACY
from bucketmoo_ds.aggregate.pcgrad import orders

# The largest target: a cosine is not known better. Nearer to 1, what is added of the other row has no bound.
NEARLY_PARALLEL = 1.0 - GRAM_ACCURACY


@register("gradvac")
@dataclasses.dataclass(frozen=True)
class GradVac(Stateful):
    """Gradient vaccine (Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models, ICLR 2021, algorithm 1).

    Row i meets the others in PCGrad's random order. With c the cosine of what it has become and g_j, and t the target
    of the pair: where `c < t`, g_j is added, `|g_i| (t sqrt(1 - c^2) - c sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2))` times,
    which makes the cosine t; and the target moves, `t <- (1 - beta) t + beta c`. The paper sums the K results; here
    they are averaged.

    The targets, K^2 a block and from 0 in the first window (which is PCGrad's), are the state; (i, j) and (j, i) have
    different ones. They change in windows that have both languages, whose rows are not zero. All blocks share the
    orders. TorchJD's weights over K but for its `eps`, which depends on the scale of rows.

    Guarantee by block: none. Where a target nears 1, as of two languages that were nearly parallel, a small deviation
    adds the other row up to `500 |g_i| / |g_j|` times, and d is as much longer than the mean row. Costs two PCGrads.
    It does not stream, though it is cheap: what is kept has to be alike on all ranks, and streaming leaves that to
    their CPUs.

    Args:
        beta: how fast targets move, from 0 (PCGrad) to below 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        check_number("gradvac", "beta", self.beta, 0.0, 1.0)

    def start(self, languages: int) -> State:
        """See `Stateful.start`."""
        return {"targets": torch.zeros(languages, languages, dtype=torch.float64)}

    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """See `Stateful.step`."""
        cosines, norms, nonzero = unit_rows(gram, mask)
        each = torch.arange(mask.shape[-1], device=gram.device)
        targets = state["targets"]
        # vaccinated[b, i] holds the weights, over the unit rows of block b, of what unit row i has become.
        vaccinated = torch.eye(mask.shape[-1], dtype=gram.dtype, device=gram.device).repeat(len(gram), 1, 1)
        products = cosines  # of each of them with every unit row
        for others in orders(mask.shape[-1], generator, gram.device).T:
            index = others[:, None].expand(len(gram), -1, 1)
            length = (vaccinated * products).sum(-1).clamp(min=0.0).sqrt()
            meets = nonzero & nonzero.index_select(1, others) & (others != each) & (length > 0.0)
            cosine = products.gather(-1, index).squeeze(-1) / torch.where(meets, length, 1.0)
            cosine = cosine.clamp(-1.0, 1.0)
            target = targets.gather(-1, index).squeeze(-1)
            sine, wanted = (1.0 - cosine.square()).sqrt(), target.clamp(max=NEARLY_PARALLEL)
            added = length * (wanted * sine / (1.0 - wanted.square()).sqrt() - cosine)
            added = torch.where(meets & (cosine < wanted), added, 0.0).unsqueeze(-1)
            vaccinated = vaccinated.scatter_add(-1, index, added)
            products = products + added * cosines.index_select(1, others)
            moved = torch.where(meets, (1.0 - self.beta) * target + self.beta * cosine, target)
            targets = targets.scatter(-1, index, moved.unsqueeze(-1))
        lengths = torch.where(nonzero, norms, mask.to(norms.dtype))
        summed = (vaccinated * lengths.unsqueeze(-1)).sum(-2) / torch.where(nonzero, norms, 1.0)
        return summed / mask.sum(-1, keepdim=True), {"targets": targets}
