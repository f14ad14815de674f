"""The record: what was decided in a window, and what a run counts and keeps over its windows."""

from __future__ import annotations

import collections
import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.comm.agreement import digest
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.logs import logger
from bucketmoo_ds.plan.blocks import BlockPlan


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What was decided in one window. `B` blocks, `K` languages; entries of absent and left out languages are 0.

    Args:
        window: number of the window, from 0.
        gram: `[B, K, K]` float64, of the rows as the aggregator saw them (means per target token); with `gram: cross`
            freed of noise on its diagonal.
        weights: `[B, K]` float64: the combined gradient of block b is the sum of `weights[b, l] row_l`.
        present: the languages that took part.
        target_tokens: tokens that each of the K languages fed to the window.
        nonfinite: (language, bucket) names whose row was not finite; not empty means that the step is skipped.
        fresh: whether the weights are the first that were solved with these Grams; else an earlier window's (see
            `gram_every`), and so are the Grams.
        losses: the mean loss per target token of each of the K languages, where `normalize` or the rule asks for it and
            the weights are fresh.
        left_out: see `BlockPlan.left_out`.
    """

    window: int
    gram: Tensor
    weights: Tensor
    present: tuple[int, ...]
    target_tokens: tuple[int, ...]
    nonfinite: tuple[tuple[str, str], ...]
    fresh: bool = True
    losses: tuple[float, ...] | None = None
    left_out: tuple[tuple[int, ...], ...] = ()

    @property
    def mask(self) -> Tensor:
        """`[B, K]` bool: which languages took part, block by block."""
        mask = torch.zeros(self.weights.shape, dtype=torch.bool)
        mask[:, list(self.present)] = True
        for block, unused in enumerate(self.left_out):
            mask[block, list(unused)] = False
        return mask


class Record:
    """The windows of a run.

    Args:
        config, plan: as in `BucketMOO`.
        speaks: whether this rank writes to the log.

    Attributes:
        windows: how many are resolved.
        counters: of windows, skipped ones, and what befell them.
        last: the latest one's resolution.
    """

    def __init__(self, config: BucketMOOConfig, plan: BlockPlan, speaks: bool) -> None:
        self._config = config
        self._plan = plan
        self._speaks = speaks
        self.windows = 0
        self.counters: collections.Counter[str] = collections.Counter()
        self.last: Resolution | None = None
        self._said_one_half = False

    def add(self, resolution: Resolution) -> None:
        """Closes a window."""
        self.last = resolution
        self.counters["windows"] += 1
        if resolution.nonfinite:
            self.counters["skipped_windows"] += 1
            for language in {language for language, _ in resolution.nonfinite}:
                self.counters[f"nonfinite.{language}"] += 1
            found = "; ".join(f"language {language} in {bucket}" for language, bucket in resolution.nonfinite)
            self.warn(f"rows that are not finite, step skipped: {found}")
        self.windows += 1

    def note_flat_micro_step(self, advice: str) -> None:
        """Counts a micro-step whose gradients could not go by node, and says so the first time."""
        self.counters["flat_micro_steps"] += 1
        if self.counters["flat_micro_steps"] == 1:
            self.warn(advice)

    def note_one_half(self, languages: Sequence[int]) -> None:
        """Counts the languages of a window whose micro-batches make no two halves, and says so the first time."""
        for language in languages:
            self.counters[f"one_half.{self._config.languages[language]}"] += 1
        if languages and not self._said_one_half:
            self._said_one_half = True
            names = ", ".join(self._config.languages[language] for language in languages)
            self.warn(
                f'{SECTION}.gram = "cross": {names} had one micro-batch only, so that noise stays on the diagonal '
                "of the Gram there; take more micro-steps (gradient_accumulation_steps) or ranks, or fewer languages "
                "in a window"
            )

    def warn(self, text: str) -> None:
        """Writes a warning that names the window."""
        if self._speaks:
            logger.warning("window %d: %s", self.windows, text)

    def generator(self, window: int | None = None) -> torch.Generator:
        """Returns the source of randomness of a window, by default this one, alike on all ranks. It is derived from
        (seed, window), so the number of windows is all the random state there is."""
        seed = digest(struct.pack("<qq", self._config.seed, self.windows if window is None else window))
        return torch.Generator().manual_seed(seed & (2**63 - 1))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain JSON values."""
        return {"windows": self.windows, "counters": dict(self.counters), "fingerprint": self._plan.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: the state is of another model, bucket size or granularity.
        """
        if state["fingerprint"] != self._plan.fingerprint():
            raise ConfigError(
                f"the checkpoint's blocks are not this run's (fingerprint {state['fingerprint']}, here "
                f"{self._plan.fingerprint()}): use the same model, zero_optimization.reduce_bucket_size and "
                f"{SECTION}.granularity"
            )
        self.windows = int(state["windows"])
        self.counters = collections.Counter({str(key): int(value) for key, value in state["counters"].items()})
