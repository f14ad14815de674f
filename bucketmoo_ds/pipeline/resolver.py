"""From the partial Grams of a window's cells to the weights of its rows: the sum over ranks, and the rule.

All of it stays on the device of the Grams. What was decided goes to the host once a window, when `decided` is called.

While *streaming* every rank is told the Grams of some buckets by all ranks, and solves them: one collective.
*Deferred*, each block belongs to one rank, block b to rank b mod W, which is told its Grams, solves it, and tells all
ranks its weights: two collectives a window, a W-th of the work, and weights that are alike on all ranks whatever their
CPUs are.
Grams are added up in the order of the ranks either way, so that both give the same bits.

Where something asks for the languages' losses, their sums over a rank's target tokens travel with its Grams, as the
diagonal of one more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import Row, Slot
from bucketmoo_ds.pipeline.halves import Folding, shown
from bucketmoo_ds.pipeline.memory import Memory
from bucketmoo_ds.pipeline.resolution import Resolution
from bucketmoo_ds.pipeline.reuse import Reuse
from bucketmoo_ds.pipeline.window import Window
from bucketmoo_ds.plan.blocks import BlockPlan
from bucketmoo_ds.plan.choices import choose_gram_every, create_aggregator, needs_losses
from bucketmoo_ds.transfer import ToHost, to_device


@dataclasses.dataclass(frozen=True)
class Decided:
    """What was decided in a window, on the host; see `Resolution`."""

    gram: Tensor
    weights: Tensor
    nonfinite: tuple[tuple[str, str], ...]
    losses: tuple[float, ...] | None = None


class Resolver:
    """Decides the weights of a window, all cells at once or some buckets' cells at a time.

    Args:
        config, plan, exchange: as in `BucketMOO`.
        window: the slots, which say what a stored row counts.
        backend: of the ops that rules use.
        device: where Grams are.

    Attributes:
        memory: what the rule keeps; of a window's blocks it is told what is new as they are solved.
        reuse: the weights of windows that solve nothing.
        fresh: whether this window is solved.

    Raises:
        ConfigError: an unknown aggregator or option.
    """

    def __init__(
        self,
        config: BucketMOOConfig,
        plan: BlockPlan,
        exchange: Exchange,
        window: Window,
        backend: str,
        device: torch.device,
    ) -> None:
        self.aggregator = create_aggregator(config)
        self._config = config
        self._plan = plan
        self._exchange = exchange
        self._window = window
        self._backend = backend
        self._device = device
        self._needs_losses = needs_losses(config)
        self.memory = Memory(config, self.aggregator, len(plan.blocks), device)
        self.reuse = Reuse(config, choose_gram_every(config, automatic=1))
        self._counting = plan.counting(len(config.languages))
        cells = torch.tensor(plan.cell_block)
        # Where a block has several cells, those of each one after the other, to be added up.
        self._cells_by_block = to_device(cells.argsort(stable=True), torch.int64, device)
        self._cells_a_block = to_device(cells.bincount(minlength=len(plan.blocks)), torch.int64, device)
        self._cell_block = to_device(cells, torch.int64, device)
        self.start_window()

    def start_window(self) -> None:
        """Forgets what was decided."""
        self._blocks: list[int] = []
        self._decided: list[tuple[Tensor, Tensor]] = []  # Grams and weights of these blocks
        self._partial: Tensor | None = None
        self._coefficients: Tensor | None = None
        self._summed_losses = torch.zeros(len(self._config.languages), dtype=torch.float64, device=self._device)
        self._losses: Tensor | None = None
        self._folding: Folding | None = None
        self.memory.forget()
        self.fresh = self.reuse.due

    def add_loss(self, slot: Slot) -> None:
        """Takes the loss of this rank's micro-step, where something asks for it."""
        if self._needs_losses and slot.target_tokens > 0:
            assert slot.loss is not None, "the tracker refuses a micro-step whose loss is unknown"
            self._summed_losses[slot.language] += slot.loss.to(self._device, torch.float64, non_blocking=True)

    def resolve_some(self, partial: Tensor, cells: Sequence[int], generator: torch.Generator) -> Tensor:
        """Decides the weights of some blocks that have one cell each, on every rank.

        Args:
            partial: `[C, R, R]` float64, this rank's part of the Grams of the stored rows: of the K' present languages,
                or of their halves.
            cells: the numbers of the C cells.
            generator: see `aggregate.solve`.

        Returns:
            `[C, R]` float64: what the stored rows of each cell are multiplied by.
        """
        blocks = [self._plan.cell_block[cell] for cell in cells]
        told = _summed(self._exchange.all_gather_grams(self._with_losses(partial)))
        gram, weights, state = self._solve(told, blocks, generator)
        self.memory.take(blocks, self._window.present, state)
        self._blocks += blocks
        self._decided.append((gram, weights))
        return self._of_rows(weights)

    def resolve_all(self, partial: Tensor, generator: torch.Generator) -> Tensor:
        """Decides the weights of all blocks, each on the rank that it belongs to; see `resolve_some`."""
        blocks, world_size, count = len(self._plan.blocks), self._exchange.world_size, partial.shape[-1]
        self._partial = partial
        by_block = partial[self._cells_by_block]
        if self._plan.spans_buckets:
            by_block = torch.segment_reduce(by_block, "sum", lengths=self._cells_a_block, axis=0, unsafe=True)
        a_rank = -(-blocks // world_size)
        dealt = by_block.new_zeros(a_rank * world_size, count, count)
        dealt[:blocks] = by_block
        parts = self._with_losses(dealt.view(a_rank, world_size, count, count)).transpose(0, 1).contiguous()
        own = [min(block, blocks - 1) for block in range(self._exchange.rank, a_rank * world_size, world_size)]
        own_gram, own_weights, own_state = self._solve(_summed(self._exchange.all_to_all_grams(parts)), own, generator)
        told = [own_gram, own_weights, *own_state.values()]
        packed = self._exchange.all_gather_grams(torch.cat([each.reshape(len(own), -1) for each in told], dim=1))
        unpacked = packed.transpose(0, 1).flatten(0, 1)[:blocks].split([each[0].numel() for each in told], dim=1)
        gram, weights, *state = (each.view(blocks, *mine.shape[1:]) for each, mine in zip(unpacked, told, strict=True))
        self.memory.take(range(blocks), self._window.present, dict(zip(own_state, state, strict=True)))
        self._blocks += range(blocks)
        self._decided.append((gram, weights))
        return self._of_rows(weights)[self._cell_block]

    def _of_rows(self, weights: Tensor) -> Tensor:
        """Returns what the stored rows are multiplied by, `[B, R]`: both halves of a language alike."""
        folding = self.folding
        each = weights if folding is None else weights.index_select(1, folding.language)
        return each * self.coefficients

    @property
    def folding(self) -> Folding | None:
        """How the Grams of halves become those of languages, where they are crossed."""
        if self._folding is None and self._config.gram == "cross":
            window = self._window
            self._folding = Folding.of(window.rows, window.present, window.half_tokens, self._device)
        return self._folding

    @property
    def coefficients(self) -> Tensor:
        """`[R]` float64 on the device: see `Window.coefficients`."""
        if self._coefficients is None:
            self._coefficients = to_device(self._window.coefficients(), torch.float64, self._device)
        return self._coefficients

    def _with_losses(self, grams: Tensor) -> Tensor:
        """Appends the losses of the K' present languages, as what is exchanged with Grams `[B, ..., R, R]`."""
        if not self._needs_losses:
            return grams
        present = to_device(self._window.present, torch.int64, self._device)
        losses = grams.new_zeros(grams.shape[-1])
        losses.index_copy_(0, self._first_rows(), self._summed_losses.index_select(0, present))
        return torch.cat([grams, torch.diag_embed(losses).expand(1, *grams.shape[1:])])

    def _take_losses(self, summed: Tensor) -> Tensor:
        """Takes what `_with_losses` has appended, summed over the ranks, off again; returns the Grams."""
        if not self._needs_losses:
            return summed
        tokens = [self._window.target_tokens[language] for language in self._window.present]
        losses = summed[-1].diagonal().index_select(0, self._first_rows())
        self._losses = losses / to_device(tokens, torch.float64, self._device)
        return summed[:-1]

    def _first_rows(self) -> Tensor:
        """`[K']` on the device: the first of the stored rows of each present language."""
        languages = [language for language, _ in self._window.rows]
        return to_device([languages.index(each) for each in self._window.present], torch.int64, self._device)

    def reused(self, rows: Sequence[Row], scales: Sequence[float]) -> Tensor:
        """Returns `[C, P]` float64, what gradients of some rows, given in units of `scales` of them, are multiplied by
        in each cell, where the weights are those of an earlier window."""
        weights = self._before()[1][list(self._plan.cell_block)]
        factor = dict(zip(self._window.rows, self._window.coefficients(), strict=True))
        units = [factor[row] * scale for row, scale in zip(rows, scales, strict=True)]
        of_rows = weights[:, [language for language, _ in rows]]
        return to_device(of_rows * torch.tensor(units, dtype=torch.float64), torch.float64, self._device)

    def decided_before(self, largest: Tensor, rows: Sequence[Row]) -> Decided:
        """Returns what was decided in an earlier window. The host waits here, as `decided` does.

        Args:
            largest: `[buckets, P]`, the largest absolute value of each gradient, or row, of this rank's shards.
            rows: whose.
        """
        told = ToHost(self._exchange.all_gather_grams(largest.double())).read()
        named = [
            (self._config.languages[rows[place][0]], self._plan.buckets[bucket].name)
            for bucket, place in (~told.isfinite()).any(0).nonzero().tolist()
        ]
        return Decided(*self._before(), tuple(dict.fromkeys(named)))

    def close_window(self, resolution: Resolution) -> None:
        """Keeps what was decided, unless its rows were not finite."""
        if not self.fresh:
            self.reuse.use()
        elif not resolution.nonfinite:
            self.memory.commit()
            self.reuse.take(resolution.gram, resolution.weights, self._takes_part())

    def decided(self) -> Decided:
        """Returns what was decided in this window. The host waits here, and nowhere else."""
        blocks, languages = len(self._plan.blocks), len(self._config.languages)
        present = torch.tensor(self._window.present)
        on_device = [torch.cat([gram, weights.unsqueeze(-1)], dim=-1) for gram, weights in self._decided]
        if self._losses is not None:
            on_device.append(torch.nn.functional.pad(torch.diag_embed(self._losses), (0, 1)).unsqueeze(0))
        both = ToHost(torch.cat(on_device)).read()
        losses = None
        if self._losses is not None:
            found = dict(zip(self._window.present, both[-1].diagonal().tolist(), strict=True))
            losses, both = tuple(found.get(language, 0.0) for language in range(languages)), both[:-1]
        order = torch.tensor(self._blocks)
        gram = torch.zeros(blocks, languages, languages, dtype=torch.float64)
        weights = torch.zeros(blocks, languages, dtype=torch.float64)
        gram[order[:, None, None], present[:, None], present] = both[..., :-1]
        weights[order[:, None], present] = both[..., -1]
        nonfinite = tuple(dict.fromkeys(self._named(gram.diagonal(dim1=1, dim2=2).isfinite())))
        return Decided(gram, weights, nonfinite, losses)

    def _solve(
        self, summed: Tensor, blocks: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, aggregate.State]:
        """Returns the Grams of the rows, their weights, and the new state of the blocks."""
        preferred = self._config.preferred(self._window.present)
        state = self.memory.of(blocks, self._window.present)
        gram = self._take_losses(summed) * torch.outer(self.coefficients, self.coefficients)
        noisy, folding = None, self.folding
        if folding is not None:
            crossed, noisy = folding.fold(gram)
            gram = shown(crossed, noisy)
        with ops.using(self._backend):
            weights = aggregate.solve(
                gram,
                self._mask(blocks),
                self.aggregator.at(self._config.languages, self._window.present, blocks),
                normalize=self._config.normalize,
                rescale=self._config.rescale,
                preference=None if preferred is None else to_device(preferred, torch.float64, self._device),
                losses=self._losses,
                noisy=noisy,
                weight_smoothing=self._config.weight_smoothing,
                state=state,
                generator=generator,
            )
        return gram, weights, state

    def _before(self) -> tuple[Tensor, Tensor]:
        """Returns the Grams and weights of an earlier window, for this one's languages."""
        return self.reuse.decided(self._takes_part(), self._window.present)

    def _mask(self, blocks: Sequence[int]) -> Tensor:
        """`[B', K']` bool on the device: which of the languages present take part on these blocks."""
        if self._counting is None and self._window.trained == self._window.present:
            return torch.ones(len(blocks), len(self._window.present), dtype=torch.bool, device=self._device)
        return to_device(self._takes_part()[list(blocks)][:, self._window.present], torch.bool, self._device)

    def _takes_part(self) -> Tensor:
        """`[B, K]` bool on the host: which languages take part in this window, block by block."""
        mask = torch.zeros(len(self._plan.blocks), len(self._config.languages), dtype=torch.bool)
        mask[:, self._window.trained] = True  # without a probe, which steers the sampling and is no objective
        return mask if self._counting is None else mask & self._counting

    def _named(self, finite: Tensor) -> Iterator[tuple[str, str]]:
        """Names the (language, bucket) pairs whose row is not finite.

        Args:
            finite: `[B, K]` bool, of the Grams of blocks: the same on all ranks.
        """
        if finite.all():
            return
        suspects = ~finite[list(self._plan.cell_block)]
        if self._partial is not None and self._plan.spans_buckets:  # each rank knows in part which bucket it is
            present = self._window.present
            own = ~self._partial.diagonal(dim1=1, dim2=2).isfinite().cpu()
            of = torch.tensor([language for language, _ in self._window.rows])
            own = torch.stack([own[:, of == language].any(1) for language in present], 1)
            told = torch.tensor(self._exchange.gather_numbers(own.flatten().tolist())).any(0).view(-1, len(present))
            narrowed = suspects.clone()
            narrowed[:, present] &= told
            suspects = narrowed if narrowed.any() else suspects  # a sum of finite parts may overflow
        for cell, language in suspects.nonzero().tolist():
            yield self._config.languages[language], self._plan.buckets[self._plan.cell_bucket[cell]].name


def _summed(parts: Tensor) -> Tensor:
    """The sum over the first dimension, added up in its order, which is that of the ranks: so that all ranks have the
    same bits, one kernel whatever their number."""
    return parts[0] if len(parts) == 1 else parts.cumsum(0)[-1]
