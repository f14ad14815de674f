"""From the partial Grams of a window's cells to the weights of its rows: the sum over ranks, and the rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.comm.agreement import check_equal
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.pipeline.window import Window
from bucketmoo_ds.plan.blocks import BlockPlan
from bucketmoo_ds.plan.choices import create_aggregator


class Resolver:
    """Decides the weights of a window, all cells at once or a bucket's cells at a time.

    Args:
        config, plan, exchange: as in `BucketMOO`.
        window: the slots, which say what a stored row counts.
        backend: of the ops that rules use.

    Attributes:
        gram, weights: what was decided in this window so far, as in `Resolution`.
        nonfinite: (language, bucket) names whose row was not finite.

    Raises:
        ConfigError: an unknown aggregator or option.
    """

    def __init__(
        self, config: BucketMOOConfig, plan: BlockPlan, exchange: Exchange, window: Window, backend: str
    ) -> None:
        self.aggregator = create_aggregator(config)
        self._config = config
        self._plan = plan
        self._exchange = exchange
        self._window = window
        self._backend = backend
        self.start_window()

    def start_window(self) -> None:
        """Forgets what was decided."""
        blocks, languages = len(self._plan.blocks), len(self._config.languages)
        self.gram = torch.zeros(blocks, languages, languages, dtype=torch.float64)
        self.weights = torch.zeros(blocks, languages, dtype=torch.float64)
        self.nonfinite: list[tuple[str, str]] = []

    def resolve(self, partial: Tensor, cells: Sequence[int], generator: torch.Generator) -> Tensor:
        """Decides the weights of the blocks of some cells.

        Args:
            partial: `[C, K', K']` float64, this rank's part of the Grams of the stored rows of the K' present
                languages.
            cells: the numbers of the C cells; a block's cells come in one call.
            generator: see `aggregate.solve`.

        Returns:
            `[C, K']` float64: what the stored rows of each cell are multiplied by.
        """
        coefficients = torch.tensor(self._window.coefficients(), dtype=torch.float64)
        gram = self._exchange.all_reduce(partial).cpu() * torch.outer(coefficients, coefficients)
        self._note_nonfinite(gram, cells)
        blocks = torch.tensor([self._plan.cell_block[cell] for cell in cells])
        used, position = blocks.unique(return_inverse=True)
        summed = torch.zeros(len(used), *gram.shape[1:], dtype=torch.float64).index_add_(0, position, gram)
        with ops.using(self._backend):
            weights = aggregate.solve(
                summed,
                torch.ones(summed.shape[:2], dtype=torch.bool),
                self.aggregator,
                normalize=self._config.normalize,
                rescale=self._config.rescale,
                generator=generator,
            )
        present = torch.tensor(self._window.present)
        self.gram[used[:, None, None], present[:, None], present] = summed
        self.weights[used[:, None], present] = weights
        return (weights * coefficients)[position]

    def check_ranks(self) -> None:
        """Compares the weights of all ranks.

        Raises:
            DisagreementError: on every rank, if they differ.
        """
        message = "the ranks reached different weights from the same Grams"
        check_equal(self._exchange, bytes(self.weights.flatten().view(torch.uint8).tolist()), message)

    def _note_nonfinite(self, gram: Tensor, cells: Sequence[int]) -> None:
        bad = ~torch.isfinite(gram.diagonal(dim1=1, dim2=2))
        for cell, index in bad.nonzero().tolist():
            language = self._config.languages[self._window.present[index]]
            where = (language, self._plan.buckets[self._plan.cell_bucket[cells[cell]]].name)
            if where not in self.nonfinite:
                self.nonfinite.append(where)
