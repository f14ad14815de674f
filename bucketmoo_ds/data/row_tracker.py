"""The languages of the rows of one rank's forward passes, remembered until their backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.attention import Attention
from bucketmoo_ds.data.batch import Entries, LanguageTracker, MicroBatch
from bucketmoo_ds.data.rows import Rows, rows_of
from bucketmoo_ds.errors import LanguageError
from bucketmoo_ds.transfer import ToHost


@dataclasses.dataclass(frozen=True)
class MixedBatch(MicroBatch):
    """One forward pass of several languages; `language` is -1.

    Args:
        rows: the languages of its tokens.
        counts: `[K]` int64: their target tokens.
    """

    rows: Rows | None = None
    counts: ToHost | None = None


@dataclasses.dataclass(frozen=True)
class MixedSlot:
    """What one rank trains on in a micro-step.

    Args:
        target_tokens: of each of the K languages.
        scale: such that `scale` times a language's part of the gradient is the gradient of the sum of its token losses.
    """

    target_tokens: tuple[int, ...]
    scale: float


class RowTracker(LanguageTracker):
    """Takes the languages off the batches of one rank; see `LanguageTracker`.

    Args:
        config, model: as in `LanguageTracker`.
    """

    def __init__(self, config: BucketMOOConfig, model: nn.Module | None = None) -> None:
        super().__init__(config, model)
        self._attention = Attention(model)
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def found(self, entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MixedBatch | LanguageError:
        """Returns what a forward pass with these arguments says about itself, our entries taken off."""
        self._inputs = args, kwargs
        try:
            return self._micro_batch(entries)
        except LanguageError as error:
            return error
        finally:
            self._inputs = ((), {})

    def mixed_slot(self, micro_steps: int, world_size: int) -> MixedSlot | LanguageError:
        """Returns the slot of the forward passes since the last call. See `LanguageTracker.slot`."""
        try:
            batches = [each for each in (passage.batch for passage in self._take()) if isinstance(each, MixedBatch)]
            for each in batches:
                assert each.rows is not None
                each.rows.check()
            tokens, divisor = self._normalisation(batches, world_size)
            counts = torch.stack([each.counts.read() for each in batches if each.counts is not None]).sum(0)
            return MixedSlot(tuple(counts.tolist()), float(micro_steps * tokens) if divisor is None else divisor)
        except LanguageError as error:
            return error

    def count(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """Returns the target tokens `[K]` int64 of several batches, on the host.

        Raises:
            LanguageError: one of them names no valid languages.
        """
        total = torch.zeros(len(self._table), dtype=torch.int64)
        for batch in batches:
            _, kwargs, entries = self.strip((), dict(batch))
            found = self.found(entries, (), kwargs)
            if isinstance(found, LanguageError):
                raise found
            assert found.rows is not None and found.counts is not None
            found.rows.check()
            total += found.counts.read()
        return total

    def _micro_batch(self, entries: Entries) -> MixedBatch:
        value, *more = self._languages_told(entries)
        if more:
            raise LanguageError(
                "both the batch and session.language(...) say which languages its rows are of; name them in one place"
            )
        args, kwargs = self._inputs
        tokens = self._tokens_told(entries)
        rows = rows_of(
            value, args, kwargs, self._table, shifted=self._shifted, attention=self._attention, target_tokens=tokens
        )
        divisor, items = self._loss_told(entries)
        total = ToHost(rows.target_tokens.sum())
        return MixedBatch(-1, total, divisor, items, rows=rows, counts=ToHost(rows.target_tokens))
