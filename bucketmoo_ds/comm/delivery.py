"""Combined pieces on their way to the ranks that own them, where a framework's partitions are no even slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bucketmoo_ds.comm.exchange import Exchange, Received


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a run of a bucket's combined gradient has to go.

    Args:
        start, numel: the run, in elements of the bucket.
        owner: the rank that needs it.
        target: which of the owner's target tensors.
        target_start: where in that tensor.
    """

    start: int
    numel: int
    owner: int
    target: int
    target_start: int


class Delivery:
    """Sends the combined shards of one bucket on to their owners (ZeRO-1/2, whose partitions are no even slices).

    Every rank resolves an even slice of the bucket, whoever owns its elements: so the rows, K times the elements, are
    spread evenly, and only the combined gradient, once a window, travels to its owner.
    """

    def __init__(self, exchange: Exchange, pieces: Sequence[Piece], shard_numel: int) -> None:
        self._exchange = exchange
        ranks = range(exchange.world_size)
        self._outgoing = [_route(pieces, exchange.rank, shard_numel, owner) for owner in ranks]
        self._incoming = [_route(pieces, rank, shard_numel, exchange.rank) for rank in ranks]

    def start(self, shard: Tensor) -> Received:
        """Starts sending this rank's combined shard `[S]`."""
        parts = [shard.narrow(0, piece.start, piece.numel) for route in self._outgoing for piece in route]
        send = torch.cat(parts) if parts else shard.new_empty(0)
        return self._exchange.all_to_all(send, _sizes(self._outgoing), _sizes(self._incoming))

    def finish(self, data: Tensor, targets: Sequence[Tensor]) -> None:
        """Writes what arrived into this rank's flat target tensors."""
        position = 0
        for route in self._incoming:
            for piece in route:
                part = data.narrow(0, position, piece.numel)
                targets[piece.target].narrow(0, piece.target_start, piece.numel).copy_(part)
                position += piece.numel


class Deliveries:
    """Combined gradients on their way to where they are written, bucket by bucket."""

    def __init__(self) -> None:
        self._received: dict[int, Received] = {}

    def start(self, bucket: int, received: Received) -> None:
        """Keeps what is under way, or waits for its turn to be written."""
        self._received[bucket] = received

    def finish(self, write: Callable[[int, Tensor], None]) -> None:
        """Calls `write` with each bucket and what has arrived."""
        for bucket, received in self._received.items():
            write(bucket, received.wait())
        self._received.clear()

    def clear(self) -> None:
        """Waits for what is under way, and forgets it."""
        self.finish(lambda bucket, arrived: None)


def _route(pieces: Sequence[Piece], rank: int, shard_numel: int, owner: int) -> list[Piece]:
    """The pieces of `owner` that lie in the shard of `rank`, with `start` counted from the shard's first element;
    runs that are neighbours on both sides are merged."""
    low, high = rank * shard_numel, (rank + 1) * shard_numel
    route: list[Piece] = []
    for piece in pieces:
        start, stop = max(piece.start, low), min(piece.start + piece.numel, high)
        if piece.owner != owner or start >= stop:
            continue
        target_start = piece.target_start + start - piece.start
        last = route[-1] if route else None
        if (
            last is not None
            and last.target == piece.target
            and last.start + last.numel == start - low
            and last.target_start + last.numel == target_start
        ):
            route[-1] = dataclasses.replace(last, numel=last.numel + stop - start)
        else:
            route.append(Piece(start - low, stop - start, owner, piece.target, target_start))
    return route


def _sizes(routes: Sequence[Sequence[Piece]]) -> list[int]:
    return [sum(piece.numel for piece in route) for route in routes]
