"""The floor that kernels are measured against: a large copy by torch, on the same threads or the same GPU."""

from __future__ import annotations

import torch

from bucketmoo_ds.apps.bench.device import MEBI, cache_bytes, free_bytes


class Copy:
    """A call that copies a tensor far larger than the cache.

    Attributes:
        moved_bytes: what it reads and what it writes. (A CPU may also read what it is about to write; that is not
            counted here or anywhere.)
    """

    def __init__(self, device: torch.device) -> None:
        wanted = max(4 * cache_bytes(device), (1024 if device.type == "cuda" else 128) * MEBI)
        elements = min(wanted, free_bytes(device) // 16) // 4
        self._source = torch.ones(elements, device=device)
        self._target = torch.zeros_like(self._source)
        self.moved_bytes = 2 * self._source.nbytes

    def __call__(self) -> None:
        self._target.copy_(self._source)
