"""Moves gradients between ranks. Knows process groups and bytes; nothing of frameworks, languages or solvers.

The flat exchange scatters a bucket evenly: rank j receives slice j of every rank's gradient, W slices of N/W elements,
and sends (W-1)/W N, what a plain reduce-scatter sends. It sums nothing: which slices belong to one row is the
caller's knowledge. `Delivery` then sends combined pieces on to the ranks that own them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Shards start at multiples of this many elements, so that 16-byte loads stay aligned for every dtype of a gradient.
ALIGNMENT = 8


class Exchange:
    """The collectives of one process group, with the bytes that this rank sent by operation.

    Args:
        group: carries gradients (NCCL or gloo); `None` is the default group.
        control: carries small host-side messages, so that agreeing on a language never waits for a device. It must
            be a gloo group, or `group` itself on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, control: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.control = control if control is not None else group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.sent_bytes: collections.Counter[str] = collections.Counter()

    def shard_numel(self, numel: int) -> int:
        """Returns the elements of each rank's shard of a bucket of `numel` elements, padding included."""
        per_rank = -(-numel // self.world_size)
        return -(-per_rank // ALIGNMENT) * ALIGNMENT

    def scatter(self, flat: Tensor) -> Received:
        """Starts the exchange of a bucket.

        Args:
            flat: `[W * S]`, this rank's gradient of the bucket, padded with zeros. It must not change before
                `Received.wait` returns.
        """
        if self.world_size == 1:
            return Received(flat, flat.view(1, -1), None)
        received = torch.empty_like(flat)
        work = dist.all_to_all_single(received, flat, group=self.group, async_op=True)
        self._count("all_to_all", flat.numel() * flat.element_size() * (self.world_size - 1) // self.world_size)
        return Received(flat, received.view(self.world_size, -1), work)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of `tensor` over the ranks: an all-reduce that adds in the order of the ranks.

        The order inside a library's all-reduce depends on where an element lies in the buffer. Here every element is
        added up alike by one rank: so all ranks get the same bytes, and the same bytes whether Grams are reduced one
        by one or all at once. It sends what a ring all-reduce sends.
        """
        if self.world_size == 1:
            return tensor
        part = -(-tensor.numel() // self.world_size)
        send = torch.nn.functional.pad(tensor.flatten(), (0, part * self.world_size - tensor.numel()))
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=self.group)
        first, *others = received.view(self.world_size, part)
        total = first.clone()
        for other in others:
            total += other
        everyone = [torch.empty_like(total) for _ in range(self.world_size)]
        dist.all_gather(everyone, total, group=self.group)
        self._count("all_reduce (Grams)", 2 * (self.world_size - 1) * part * tensor.element_size())
        return torch.cat(everyone)[: tensor.numel()].view_as(tensor)

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Returns the numbers (64-bit, signed) of every rank, rank by rank."""
        return [row.tolist() for row in self._gather(torch.tensor(numbers, dtype=torch.int64))]

    def gather_text(self, text: str, limit: int = 1024) -> list[str]:
        """Returns the text of every rank, cut to `limit` bytes of UTF-8."""
        data = bytearray(text.encode(errors="backslashreplace")[:limit].ljust(limit, b"\0"))
        rows = self._gather(torch.frombuffer(data, dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]

    def all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Received:
        """Starts an exchange of unequal parts: `send` is the parts for rank 0, 1, ... one after the other."""
        if self.world_size == 1:
            return Received(send, send, None)
        received = torch.empty(sum(receive_sizes), dtype=send.dtype, device=send.device)
        work = dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self.group, async_op=True)
        away = sum(send_sizes) - send_sizes[self.rank]
        self._count("all_to_all (combined)", away * send.element_size())
        return Received(send, received, work)

    def _gather(self, mine: Tensor) -> list[Tensor]:
        if self.world_size == 1:
            return [mine]
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.control)
        self._count("all_gather (control)", mine.numel() * mine.element_size() * (self.world_size - 1))
        return everyone

    def _count(self, operation: str, sent: int) -> None:
        self.sent_bytes[operation] += sent


@dataclasses.dataclass
class Received:
    """A collective under way: keeps the sent tensor alive until the received one may be read."""

    _sent: Tensor
    _received: Tensor
    _work: dist.Work | None

    def wait(self) -> Tensor:
        """Returns the received tensor. On CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._received


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

    def finish(self, received: Received, targets: Sequence[Tensor]) -> None:
        """Writes what arrived into this rank's flat target tensors."""
        data = received.wait()
        position = 0
        for route in self._incoming:
            for piece in route:
                part = data.narrow(0, position, piece.numel)
                targets[piece.target].narrow(0, piece.target_start, piece.numel).copy_(part)
                position += piece.numel


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
