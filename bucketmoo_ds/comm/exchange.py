"""Moves gradients between ranks. Knows process groups and bytes; nothing of frameworks, languages or solvers.

A bucket is scattered evenly: rank j ends with slice j. Nobody sends more than a plain reduce-scatter does, (W-1)/W N.

*Flat*: rank j receives slice j of every rank's gradient, W slices of N/W elements. It sums nothing: which slices belong
to one row is the caller's knowledge. Between nodes of L ranks each rank sends (W-L)/W N.

*By node*: where all ranks of a node hold gradients of one row, a reduce-scatter adds them up inside the node first, and
an all-to-all between ranks of equal position in their nodes exchanges what is left. Rank j receives slice j of every
node's sum, W/L slices, and of the bytes only (1/L - 1/W) N go between nodes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bucketmoo_ds.comm.streams import SideStream

# Shards start at multiples of this many elements, so that 16-byte loads stay aligned for every dtype of a gradient.
ALIGNMENT = 8


class Exchange:
    """The collectives of one process group, with the bytes that this rank sent by operation.

    Without `torch.distributed` it is the exchange of one rank with itself.

    Args:
        group: carries gradients (NCCL or gloo); `None` is the default group.
        control: carries small host-side messages, so that agreeing on a language never waits for a device. It must
            be a gloo group, or `group` itself on the CPU.
        ranks_per_node: L, ranks that share a fast connection, consecutive in the group. With several nodes of several
            ranks each, gradients can go by node; agreeing on that and making the groups for it are collective calls.

    Attributes:
        nodes: how many nodes `scatter_by_node` exchanges between; 1 where gradients cannot go by node.
        sent_bytes, sent_between_nodes: what this rank has sent, by operation, and what of it left the node.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
        ranks_per_node: int = 1,
    ) -> None:
        self.group = group
        self.control = control if control is not None else group
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if together else 0
        self.world_size = dist.get_world_size(group) if together else 1
        self.sent_bytes: collections.Counter[str] = collections.Counter()
        self.sent_between_nodes: collections.Counter[str] = collections.Counter()
        self.ranks_per_node = 1
        told = {row[0] for row in self.gather_numbers([ranks_per_node])}
        if len(told) == 1 and self.world_size % ranks_per_node == 0:  # or nodes are not alike
            self.ranks_per_node = ranks_per_node
        self.nodes = self.world_size // self.ranks_per_node if self.ranks_per_node > 1 else 1
        self._between: SideStream | None = None  # where the first of two stages is waited for
        if self.nodes > 1:
            self._inside, self._across = _node_groups(group, self.rank, self.ranks_per_node)

    def shard_numel(self, numel: int) -> int:
        """Returns the elements of each rank's shard of a bucket of `numel` elements, padding included."""
        per_rank = -(-numel // self.world_size)
        return -(-per_rank // ALIGNMENT) * ALIGNMENT

    def scatter(self, flat: Tensor) -> Received:
        """Starts the flat exchange of a bucket; what is received is `[W, S]`.

        Args:
            flat: `[W * S]`, this rank's gradient of the bucket, padded with zeros. It must not change before
                `Received.wait` returns.
        """
        if self.world_size == 1:
            return Received(flat.view(1, -1))
        received = torch.empty_like(flat)
        work = dist.all_to_all_single(received, flat, group=self.group, async_op=True)
        slice_bytes = flat.nbytes // self.world_size
        self._count("all_to_all", slice_bytes * (self.world_size - 1), slice_bytes * self._ranks_elsewhere)
        return Received(received.view(self.world_size, -1), work, (flat,))

    def scatter_by_node(self, flat: Tensor) -> Received:
        """Starts the exchange of a bucket in two stages; what is received is `[nodes, S]`.

        Args:
            flat: `[W * S]`, this rank's share of its node's row, padded with zeros.
        """
        inside, shard = self.ranks_per_node, flat.numel() // self.world_size
        by_position = flat.view(self.nodes, inside, shard).transpose(0, 1).contiguous()
        summed = torch.empty(self.nodes * shard, dtype=flat.dtype, device=flat.device)
        work = _reduce_scatter()(summed, by_position.view(-1), group=self._inside, async_op=True)
        self._count("reduce_scatter (node)", summed.nbytes * (inside - 1), 0)

        def across() -> Received:
            work.wait()
            received = torch.empty_like(summed)
            second = dist.all_to_all_single(received, summed, group=self._across, async_op=True)
            sent = summed.nbytes // self.nodes * (self.nodes - 1)
            self._count("all_to_all (nodes)", sent, sent)
            return Received(received.view(self.nodes, shard), second, (by_position, summed))

        if flat.device.type == "cpu":
            return Received(across)
        if self._between is None:
            self._between = SideStream(flat.device)
        with self._between.beside():
            return across()

    def all_gather(
        self, shard: Tensor, group: dist.ProcessGroup | None = None, out: Tensor | None = None
    ) -> Received:
        """Starts giving every rank of `group` (default: this exchange's) all shards `[S]`, rank by rank, in `out`."""
        group = group if group is not None else self.group
        if self.world_size == 1:
            return Received(shard)
        members = dist.get_process_group_ranks(group)
        received = out if out is not None else shard.new_empty(len(members) * shard.numel())
        work = _all_gather()(received, shard, group=group, async_op=True)
        everyone = dist.get_process_group_ranks(self.group)
        first = self.rank // self.ranks_per_node * self.ranks_per_node
        elsewhere = len(set(members) - set(everyone[first : first + self.ranks_per_node]))
        self._count("all_gather (combined)", shard.nbytes * (len(members) - 1), shard.nbytes * elsewhere)
        return Received(received, work, (shard,))

    def all_gather_grams(self, own: Tensor) -> Tensor:
        """Returns what every rank holds in place of `own`, rank by rank: `[W, *own.shape]`."""
        everyone = own.new_empty(self.world_size, *own.shape)
        if self.world_size == 1:
            return everyone.copy_(own)
        _all_gather()(everyone.view(-1), own.reshape(-1), group=self.group)
        self._count("all_gather (Grams)", own.nbytes * (self.world_size - 1), own.nbytes * self._ranks_elsewhere)
        return everyone

    def all_to_all_grams(self, parts: Tensor) -> Tensor:
        """Returns, rank by rank, the part that each has for this one: `[W, ...]` of `[W, ...]`."""
        if self.world_size == 1:
            return parts
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        part_bytes = parts.nbytes // self.world_size
        self._count("all_to_all (Grams)", part_bytes * (self.world_size - 1), part_bytes * self._ranks_elsewhere)
        return received

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
            return Received(send)
        received = torch.empty(sum(receive_sizes), dtype=send.dtype, device=send.device)
        work = dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self.group, async_op=True)
        node = self.rank // self.ranks_per_node * self.ranks_per_node
        away = sum(send_sizes) - send_sizes[self.rank]
        elsewhere = sum(send_sizes) - sum(send_sizes[node : node + self.ranks_per_node])
        self._count("all_to_all (combined)", away * send.element_size(), elsewhere * send.element_size())
        return Received(received, work, (send,))

    def _gather(self, mine: Tensor) -> list[Tensor]:
        if self.world_size == 1:
            return [mine]
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.control)
        self._count("all_gather (control)", mine.nbytes * (self.world_size - 1), mine.nbytes * self._ranks_elsewhere)
        return everyone

    @property
    def _ranks_elsewhere(self) -> int:
        return self.world_size - self.ranks_per_node

    def _count(self, operation: str, sent: int, between_nodes: int) -> None:
        self.sent_bytes[operation] += sent
        self.sent_between_nodes[operation] += between_nodes


@dataclasses.dataclass
class Received:
    """A collective under way.

    Args:
        result: the received tensor, or what starts the collective that makes it.
        work: the collective, or `None` where there is nothing to wait for.
        sent: what the collective reads: kept until it is through.
    """

    result: Tensor | Callable[[], Received]
    work: dist.Work | None = None
    sent: tuple[Tensor, ...] = ()

    def wait(self) -> Tensor:
        """Returns the received tensor. On CUDA the current stream waits, not the host."""
        if not isinstance(self.result, Tensor):
            return self.result().wait()
        if self.work is not None:
            self.work.wait()
        return self.result


def _reduce_scatter() -> Any:
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name before torch 2.13


def _all_gather() -> Any:
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


def control_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns a gloo group of the same ranks for messages between hosts, which then never wait for an accelerator; a
    collective call where one has to be made."""
    if dist.get_backend(group) == "gloo":
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _node_groups(
    group: dist.ProcessGroup | None, rank: int, inside: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Makes the groups of this rank's node, and of the ranks that have its position in their nodes."""
    ranks = dist.get_process_group_ranks(group)
    first, position = rank // inside * inside, rank % inside
    members = [ranks[first : first + inside], ranks[position::inside]]
    backend = dist.get_backend(group)
    node, across = (dist.new_group(each, backend=backend, use_local_synchronization=True) for each in members)
    return node, across
