"""The memory: what rules keep of every block from window to window, alike on all ranks. It stays on the device.

Whoever solves some blocks asks for their state (`of`) and hands the new one back (`take`). That takes effect when the
window has ended well (`commit`), and is forgotten where it has not (`forget`). Languages that were not there keep what
they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds import aggregate
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.transfer import to_device

NO_MEMORY = 'the checkpoint is of another aggregator: what "{}" keeps from window to window starts anew'


class Memory:
    """The states of all blocks, in terms of all K languages.

    Args:
        config: the settings.
        aggregator: the rule.
        num_blocks: B.
        device: where Grams are.
    """

    def __init__(
        self, config: BucketMOOConfig, aggregator: aggregate.Aggregator, num_blocks: int, device: torch.device
    ) -> None:
        self._config = config
        self._device = device
        first = aggregate.first_state(aggregator, len(config.languages), config.weight_smoothing)
        self._kept = {
            name: to_device(each.expand(num_blocks, *each.shape).contiguous(), torch.float64, device)
            for name, each in first.items()
        }
        self._next: aggregate.State | None = None

    def of(self, blocks: Sequence[int], present: Sequence[int]) -> aggregate.State:
        """Returns the state of some blocks in terms of some languages, as `aggregate.solve` takes it."""
        return {name: each[self._place(each, blocks, present)] for name, each in self._kept.items()}

    def take(self, blocks: Sequence[int], present: Sequence[int], state: aggregate.State) -> None:
        """Notes the new state of some blocks, in terms of the languages that were there."""
        if self._next is None:
            self._next = {name: each.clone() for name, each in self._kept.items()}
        for name, each in self._next.items():
            each[self._place(each, blocks, present)] = state[name]

    def forget(self) -> None:
        """What was taken since the last `commit` counts no more."""
        self._next = None

    def commit(self) -> None:
        """What was taken counts from now on."""
        self._kept = self._next or self._kept
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states as plain JSON values, under the name "memory"; nothing where nothing is kept."""
        if not self._kept:
            return {}
        kept = {name: each.tolist() for name, each in self._kept.items()}
        return {"memory": {"aggregator": self._config.aggregator, "languages": list(self._config.languages), **kept}}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continues where `state` was taken. Returns `False`, and starts anew, where it is of another rule.

        Raises:
            ConfigError: it is of other languages or another number of blocks.
        """
        self.forget()
        saved = dict(state.get("memory", {}))
        aggregator, languages = saved.pop("aggregator", None), saved.pop("languages", None)
        if not self._kept:
            return True
        if aggregator != self._config.aggregator or saved.keys() != self._kept.keys():
            return False
        if languages != list(self._config.languages):
            raise ConfigError(
                f"the checkpoint has {SECTION}.languages = {languages}, here {list(self._config.languages)}: what is "
                "kept of each needs the same languages in the same order"
            )
        for name, each in self._kept.items():
            each.copy_(torch.tensor(saved[name], dtype=torch.float64))
        return True

    def _place(self, kept: Tensor, blocks: Sequence[int], present: Sequence[int]) -> tuple[Tensor, ...]:
        """The index of blocks and languages into a tensor whose dimensions after the first count languages."""
        dimensions = [blocks, *[present] * (kept.ndim - 1)]
        return tuple(
            to_device(each, torch.int64, self._device).view(-1, *[1] * (kept.ndim - 1 - place))
            for place, each in enumerate(dimensions)
        )
