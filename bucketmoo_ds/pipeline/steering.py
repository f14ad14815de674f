"""Windows move how often languages are sampled (`schedule.adapt`): the mixture that follows, and its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.pipeline.resolution import Resolution
from bucketmoo_ds.pipeline.window import Window


class Mixture(Protocol):
    """How often languages are sampled; see `bucketmoo_ds.data.mixture`."""

    def move(self, gram: Sequence[Sequence[float]], present: Sequence[int], noisy: Collection[int]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Steering:
    """Moves the mixture that follows, if one does.

    Args:
        config: the settings.

    Attributes:
        mixture: what follows.
    """

    def __init__(self, config: BucketMOOConfig) -> None:
        self._config = config
        self._saved: dict[str, Any] | None = None  # a checkpoint that came before the mixture
        self.mixture: Mixture | None = None

    def follow(self, mixture: Mixture) -> None:
        """Moves a mixture with the Grams of every window from now on."""
        self.mixture = mixture
        if self._saved is not None:
            mixture.load_state_dict(self._saved)
            self._saved = None

    def move(self, resolution: Resolution, window: Window) -> None:
        """Moves the mixture by a window's rows, each language's mean per token."""
        if self.mixture is None or not resolution.fresh or resolution.nonfinite:
            return
        units = torch.zeros(window.num_languages, dtype=torch.float64)
        units[resolution.present,] = 1.0 / torch.tensor(window.units(), dtype=torch.float64)
        gram = resolution.gram.sum(0) * units.outer(units)
        noisy = window.of_one_half if self._config.gram == "cross" else resolution.present
        self.mixture.move(gram.tolist(), resolution.present, noisy)

    def state_dict(self) -> dict[str, Any]:
        """Returns the mixture's state, under the name "mixture"; nothing where none follows."""
        return {} if self.mixture is None else {"mixture": self.mixture.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, when a mixture follows."""
        self._saved = state.get("mixture")
        if self.mixture is not None and self._saved is not None:
            self.follow(self.mixture)
