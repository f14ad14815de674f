"""Several ranks in one process: an `Exchange` whose collectives go through memory instead of a process group."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.comm.exchange import Exchange, Received

TIMEOUT_SECONDS = 20.0


class Hub:
    """Where the ranks of one simulation meet. A rank that stays away makes the others fail, not hang."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=TIMEOUT_SECONDS)
        self._slots: list[Any] = [None] * world_size

    def swap(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone


class SimulatedExchange(Exchange):
    """Rank `rank` of a hub. Without a hub it can only say who it is: enough for routes and shard sizes."""

    def __init__(self, rank: int, world_size: int, hub: Hub | None = None) -> None:
        self.rank, self.world_size, self._hub = rank, world_size, hub
        self.ranks_per_node = self.nodes = 1
        self.sent_bytes: collections.Counter[str] = collections.Counter()

    def _swap(self, value: Any) -> list[Any]:
        assert self._hub is not None
        return self._hub.swap(self.rank, value)

    def scatter(self, flat: Tensor) -> Received:
        slices = [other.view(self.world_size, -1)[self.rank] for other in self._swap(flat.clone())]
        flat.fill_(float("nan"))  # whoever still reads what was sent is found out
        return Received(torch.stack(slices), sent=(flat,))

    def all_gather_grams(self, own: Tensor) -> Tensor:
        return torch.stack(self._swap(own.clone()))

    def all_to_all_grams(self, parts: Tensor) -> Tensor:
        return torch.stack([theirs[self.rank] for theirs in self._swap(parts.clone())])

    def all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Received:
        parts = [data.split(sizes)[self.rank] for data, sizes in self._swap((send.clone(), send_sizes))]
        assert [part.numel() for part in parts] == receive_sizes
        return Received(torch.cat(parts), sent=(send,))

    def _gather(self, mine: Tensor) -> list[Tensor]:
        return [tensor.clone() for tensor in self._swap(mine.clone())]


def run_ranks(world_size: int, body: Callable[[SimulatedExchange], Any]) -> list[Any]:
    """Runs `body` once a rank, each in a thread; returns its results, or the exception it raised, rank by rank."""
    hub = Hub(world_size)
    results: list[Any] = [None] * world_size

    def one(rank: int) -> None:
        try:
            results[rank] = body(SimulatedExchange(rank, world_size, hub))
        except Exception as error:  # handed to the test, which says what it expects
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
