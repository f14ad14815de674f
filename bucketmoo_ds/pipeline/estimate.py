"""Weights from Grams of earlier windows, where the rows themselves are never there: the mixed mode's resolver.

Every `gram_every` windows each rank hands over, for each of its micro-batches, the Gram of the gradients of its 2 K
groups (`[B, 2 K, 2 K]`), two halves of a language's documents each. With s the scale of the micro-batch, such that
s times a group's gradient is the sum of its token losses' gradients, and n_g its target tokens,

    G_ij = sum over micro-batches of s^2 <g_i, g_j>  /  sum over micro-batches of n_i n_j.

Off the diagonal g_i is the sum of both halves of language i. On it the two halves are taken with each other, so that
the noise of one is independent of the other's and does not make a noisy language look long: every entry is unbiased,
and the Gram may be indefinite. It is averaged over windows with `smoothing`, and projected to the nearest positive
semidefinite one before the rule sees it. A language that never had two documents in one micro-batch has no unbiased
diagonal, and is shown with its noise until it has.

The weights then multiply rows that have their noise. A rule that holds lengths against each other (CAGrad's ball around
the mean row, MGDA's shortest vector) would lengthen a row whose noise it does not see, until the step is nothing else.
So what it sees on the diagonal is the squared length that the rows of a window are expected to have: the unbiased one,
and of the noise of a micro-batch the share that is left in a mean over the window.

Gradients shrink while a model learns, and a rule knows directions and proportions only. So what is kept of a block is
brought to the size of its newest Gram before both are averaged: otherwise the first Grams, which are the largest, would
decide the weights long after they are out of date.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.aggregate.nearest import nearest_semidefinite
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.pipeline.memory import Memory
from bucketmoo_ds.plan.choices import create_aggregator
from bucketmoo_ds.transfer import to_device


class GramEstimate:
    """The running estimate of the Grams of all blocks, alike on all ranks. It stays on the device.

    Args:
        config: the settings; `smoothing` is the share that the estimate keeps when a new one comes.
        num_blocks: B.
        exchange: the data-parallel ranks.
        backend: of the ops that rules use.
        device: where gradients are.
        counting: `[B, K]` bool, the languages that count on each block (`BlockPlan.counting`).

    Attributes:
        taken: how often the estimate has changed in this process.
        memory: what the rule keeps. It changes when a Gram comes: however often weights are solved before the next one,
            they follow from what was kept before it.

    Raises:
        ConfigError: an unknown aggregator or option.
    """

    def __init__(
        self,
        config: BucketMOOConfig,
        num_blocks: int,
        exchange: Exchange,
        backend: str,
        device: torch.device,
        counting: Tensor | None = None,
    ) -> None:
        self.aggregator = create_aggregator(config)
        self._config = config
        self._exchange = exchange
        self._backend = backend
        self._device = device
        self._blocks, self._count = num_blocks, len(config.languages)
        preferred = config.preferred(range(self._count))
        self._preference = None if preferred is None else to_device(preferred, torch.float64, device)
        all_count = torch.ones(self._blocks, self._count, dtype=torch.bool)
        self._counting = to_device(all_count if counting is None else counting, torch.bool, device)
        shape = (self._blocks + 1, self._count, self._count)  # the last one holds what was counted
        self._kept, self._kept_noisy = self._zeros(*shape), self._zeros(*shape)
        self.memory = Memory(config, self.aggregator, num_blocks, device)
        self.taken = 0
        self.clear()

    def clear(self) -> None:
        """Forgets what this window has brought."""
        shape = (self._blocks + 1, self._count, self._count)
        self._sum, self._noisy = self._zeros(*shape), self._zeros(*shape)

    def add(self, groups: Tensor, scale: float, target_tokens: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            groups: `[B, 2 K, 2 K]` float64: the Grams of the groups' gradients.
            scale: s.
            target_tokens: `[P, 2 K]`: n of every group in each of its forward passes, whose Grams are summed.
        """
        counts = target_tokens.to(torch.float64)
        halves = (self._count, 2, self._count, 2)
        both = torch.cat([groups * scale**2, (counts.mT @ counts).unsqueeze(0)]).view(-1, *halves)
        whole = both.sum((2, 4))
        crossed = torch.diag_embed(both[:, :, 0, :, 1].diagonal(dim1=1, dim2=2))
        self._sum += torch.where(torch.eye(self._count, dtype=torch.bool, device=self._device), crossed, whole)
        self._noisy += whole

    def finish(self, target_tokens: Sequence[int]) -> None:
        """Takes what all ranks have brought in a window into the estimate. What is not finite is left out.

        Args:
            target_tokens: `[K]`: of each language in the window, on all ranks.
        """
        both = self._exchange.all_gather_grams(torch.stack([self._sum, self._noisy])).cumsum(0)[-1]
        usable = (both[:, -1] > 0) & both.isfinite().all(1)
        means = torch.where(usable.unsqueeze(1), both[:, :-1] / torch.where(usable, both[:, -1], 1.0).unsqueeze(1), 0.0)
        total = to_device([max(float(each), 1.0) for each in target_tokens], torch.float64, self._device)
        # The share of a micro-batch's noise that is left in the window's rows.
        left = (both[1, -1].diagonal() / total.square()).clamp(max=1.0)
        signal, noisy = (each.diagonal(dim1=1, dim2=2) for each in means)
        signal = torch.where(usable[0].diagonal(), signal.clamp(min=0.0), noisy)
        noisy.copy_(left * noisy + (1.0 - left) * signal)
        growth = self._growth(means[1], usable[1])
        share = 1.0 - self._config.smoothing
        rests = (noisy == 0).all(1).view(-1, 1, 1)  # a block that is frozen keeps what it has
        for kept, mean, new in zip((self._kept, self._kept_noisy), means, usable, strict=True):
            # The last matrix is the sum of the shares: the first Gram counts in full.
            kept[:-1] *= growth
            newest = torch.where(rests, kept[:-1] / torch.where(kept[-1] > 0, kept[-1], 1.0), mean)
            taken = torch.cat([newest, torch.ones_like(mean[:1])])
            kept.copy_(torch.where(new, (1.0 - share) * kept + share * taken, kept))
        self.memory.commit()
        self.taken += 1
        self.clear()

    def _growth(self, noisy: Tensor, usable: Tensor) -> Tensor:
        """Returns `[B, 1, 1]`, how many times as large a new Gram is as what is kept, by the squared lengths of the
        languages that both have."""
        there = (usable & (self._kept_noisy[-1] > 0)).diagonal()
        before = self._kept_noisy[:-1] / torch.where(self._kept_noisy[-1] > 0, self._kept_noisy[-1], 1.0)
        old, new = (torch.where(there, each.diagonal(dim1=1, dim2=2), 0.0).sum(1) for each in (before, noisy))
        return torch.where((old > 0) & (new > 0), new / old, 1.0).view(-1, 1, 1)

    def gram(self) -> tuple[Tensor, Tensor]:
        """Returns the estimate `[B, K, K]`, made positive semidefinite, and the languages `[K]` bool that have one."""
        gram, noisy = (kept[:-1] / torch.where(kept[-1] > 0, kept[-1], 1.0) for kept in (self._kept, self._kept_noisy))
        gram = torch.where(torch.eye(self._count, dtype=torch.bool, device=self._device), noisy, gram)
        known = self._kept_noisy[-1].diagonal() > 0
        return nearest_semidefinite((gram + gram.mT) / 2), known

    def weights(self, gram: Tensor, known: Tensor, present: Sequence[int], generator: torch.Generator) -> Tensor:
        """Returns `[B, K]` float64, the weights of the languages present that count on a block; those without an
        estimate get their share in averaging, and the rule divides the rest among the others.

        Args:
            gram, known: as `gram` returns them, in the units of the rows.
            present: the languages that take part.
        """
        there = torch.zeros(self._count, dtype=torch.bool)
        there[list(present)] = True
        takes_part = to_device(there, torch.bool, self._device) & self._counting
        solved = takes_part & known
        everything = range(self._blocks), range(self._count)
        state = self.memory.of(*everything)
        with ops.using(self._backend):
            weights = aggregate.solve(
                gram,
                solved,
                self.aggregator.at(self._config.languages, range(self._count), range(self._blocks)),
                normalize=self._config.normalize,
                rescale=self._config.rescale,
                preference=self._preference,
                weight_smoothing=self._config.weight_smoothing,
                state=state,
                generator=generator,
            )
        self.memory.take(*everything, state)
        average = takes_part.to(torch.float64) if self._preference is None else takes_part * self._preference
        average = average / average.sum(-1, keepdim=True).clamp(min=torch.finfo(average.dtype).tiny)
        return torch.where(solved, weights * torch.where(solved, average, 0.0).sum(-1, keepdim=True), average)

    def state_dict(self) -> dict[str, Any]:
        """Returns the estimate as plain JSON values; alike on all ranks."""
        grams = {"grams": self._kept.tolist(), "noisy_grams": self._kept_noisy.tolist()}
        return grams | self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continues where `state` was taken; see `Memory.load_state_dict`."""
        for kept, name in ((self._kept, "grams"), (self._kept_noisy, "noisy_grams")):
            kept.copy_(torch.tensor(state[name], dtype=torch.float64))
        self.taken += 1
        self.clear()
        return self.memory.load_state_dict(state)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)
