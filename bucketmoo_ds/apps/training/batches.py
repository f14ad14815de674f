"""The rows of one rank's micro-batches, window by window: of one language each, or of all that the window has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from bucketmoo_ds.apps.training.settings import TrainingSettings
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.sampler import LanguageBatchSampler


class Batches:
    """Draws windows.

    In mode `mixed` the sampler gives single rows, as many as all ranks train on in a window, so that every language
    takes part that the window has a row for. They are dealt out at random, by the seed and the step alone.

    Args:
        dataset: with a column `language`.
        config: `mode` and `languages`.
        settings: the sampler's.
        micro_batch_size, micro_steps: of a rank.
        world_size, rank: among all.
        affinity: of the sampler, see `LanguageSchedule`.

    Attributes:
        sampler: knows the position, and keeps it in checkpoints.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: BucketMOOConfig,
        settings: TrainingSettings,
        *,
        micro_batch_size: int,
        micro_steps: int,
        world_size: int,
        rank: int,
        affinity: str,
    ) -> None:
        self._shape = (micro_steps, world_size, micro_batch_size)
        self._mixed = config.mode == "mixed"
        self._seed = settings.seed
        self._rank = rank
        self.sampler = LanguageBatchSampler(
            dataset,
            config,
            language_column="language",
            micro_batch_size=1 if self._mixed else micro_batch_size,
            micro_steps=micro_steps * (micro_batch_size if self._mixed else 1),
            world_size=world_size,
            rank=None if self._mixed else rank,
            temperature=settings.temperature,
            repeat=settings.repeat,
            seed=settings.seed,
            affinity="micro_step" if self._mixed else affinity,
        )
        self._drawn = iter(self.sampler)

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues where the sampler's `state` was taken."""
        self.sampler.load_state_dict(state)
        self._drawn = iter(self.sampler)

    def window(self, step: int) -> Iterator[list[int]]:
        """Yields the rows of this rank's micro-batches of the next window, which is that of `step`."""
        micro_steps, world_size, size = self._shape
        if not self._mixed:
            for _ in range(micro_steps):
                yield self._next()
            return
        rows = [row for _ in range(micro_steps * world_size * size) for row in self._next()]
        dealt = np.random.default_rng([self._seed, step]).permutation(rows).reshape(self._shape)
        yield from dealt[:, self._rank].tolist()

    def _next(self) -> list[int]:
        """What the sampler gives next; epochs follow each other."""
        try:
            return next(self._drawn)
        except StopIteration:
            self._drawn = iter(self.sampler)
            return next(self._drawn)
