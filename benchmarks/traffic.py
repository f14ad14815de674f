"""Counts the bytes that this rank sends, in two ways that share nothing.

* `record` notes every collective that Python starts on `torch.distributed` (DeepSpeed's go through it too) with its
  elements and dtype, and charges what the standard algorithm sends per rank: a ring for a reduction or a gather, the
  parts for other ranks for an all-to-all. That is the number that holds on any machine.
* `socket_bytes` asks the kernel what the TCP connections of this process really sent. On gloo that is everything, with
  gloo's headers; no other process on the machine disturbs it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What a call is for. Rows and combined pieces are bucket_moo's gradient bytes, all-reduced gradients DeepSpeed's.
GRADIENTS = ("gradients", "rows", "combined")

_EXCHANGE = {"rows": "all_to_all", "combined": "all_to_all (combined)", "grams": "all_reduce (Grams)"}

_calls: list[Call] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Collects the collectives that start inside the `with` block. `install` must have been called."""
    global _calls  # noqa: PLW0603 - torch.distributed's functions are global, so is who listens to them
    calls: list[Call] = []
    _calls = calls
    try:
        yield calls
    finally:
        _calls = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One collective.

    Args:
        operation: the function of `torch.distributed`.
        purpose: `gradients` (reduced by DeepSpeed), `rows` and `combined` (bucket_moo's exchange and delivery),
            `grams` (float64), `parameters` (ZeRO gathers the updated ones) or `control` (integers, and single numbers
            such as the gradient's norm).
        elements, dtype: of the tensor that this rank put in; of the gathered one for an all-gather.
        group_size: ranks that took part.
        sent_bytes: what this rank sends.
    """

    operation: str
    purpose: str
    elements: int
    dtype: str
    group_size: int
    sent_bytes: int


def install() -> None:
    """Wraps the collectives, once. To be called before DeepSpeed joins the process group: it keeps some of them."""
    for name, describe in _OPERATIONS.items():
        original = getattr(dist, name)
        if not hasattr(original, "_counted"):
            setattr(dist, name, _counting(name, original, describe))


def sent_by(calls: list[Call], key: str) -> dict[str, int]:
    """Returns the bytes sent, added up by a field of `Call` (`"purpose"` or `"operation"`)."""
    total: collections.Counter[str] = collections.Counter()
    for call in calls:
        total[getattr(call, key)] += call.sent_bytes
    return dict(total)


def gradient_bytes(calls: list[Call]) -> int:
    """Returns the bytes of gradients sent: neither Grams, nor control messages, nor updated parameters."""
    return sum(call.sent_bytes for call in calls if call.purpose in GRADIENTS)


def exchange_counters(calls: list[Call]) -> dict[str, int]:
    """Returns what `bucketmoo_ds.exchange.Exchange.sent_bytes` must have counted for these calls, in its own words."""
    total: collections.Counter[str] = collections.Counter()
    for call in calls:
        if call.purpose in _EXCHANGE:
            total[_EXCHANGE[call.purpose]] += call.sent_bytes
        elif call.purpose == "control" and call.operation == "all_gather":  # the rest of it is DeepSpeed's
            total["all_gather (control)"] += call.sent_bytes
    return dict(total)


def socket_bytes() -> int:
    """Returns what all open TCP connections of this process have sent so far, without what was sent again.

    Source: `struct tcp_info` of Linux 4.19 and newer, `tcpi_bytes_sent` and `tcpi_bytes_retrans`.

    Raises:
        OSError: this kernel does not count them.
    """
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(descriptor)))
        except FileNotFoundError:  # the folder's own descriptor, closed by now
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                if len(information) < 216:
                    raise OSError("the kernel's tcp_info has no tcpi_bytes_sent: Linux 4.19 or newer is needed")
                sent, again = struct.unpack_from("=QQ", information, 200)
                total += sent - again
    return total


Description = tuple[Tensor, float, bool]


def _counting(name: str, original: Callable[..., Any], describe: Callable[..., Description]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if _calls is not None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            group = bound.arguments["group"]
            size = dist.get_world_size(group)
            tensor, elements_sent, uneven = describe(bound.arguments, size, dist.get_rank(group))
            sent = round(elements_sent * tensor.element_size())
            dtype = str(tensor.dtype).removeprefix("torch.")
            # An all-gather is described by this rank's part; what it fills is `size` of them.
            elements = tensor.numel() * (size if name.startswith("all_gather") else 1)
            _calls.append(Call(name, _purpose(name, tensor, uneven), elements, dtype, size, sent))
        return original(*args, **kwargs)

    counted._counted = True  # type: ignore[attr-defined]
    return counted


def _purpose(operation: str, tensor: Tensor, uneven: bool) -> str:
    if tensor.dtype == torch.float64:
        return "grams"
    if not tensor.is_floating_point() or (tensor.numel() == 1 and not uneven):
        return "control"
    if operation.startswith("all_gather"):
        return "parameters"
    if operation == "all_to_all_single":
        return "combined" if uneven else "rows"
    return "gradients"


# Each takes (arguments, W, rank) and returns (the tensor, elements that this rank sends, whether parts are uneven).
def _all_reduce(arguments: dict[str, Any], size: int, rank: int) -> Description:
    return arguments["tensor"], 2 * (size - 1) / size * arguments["tensor"].numel(), False


def _to_or_from_one(arguments: dict[str, Any], size: int, rank: int) -> Description:
    """Broadcast and reduce: a chain sends the tensor W - 1 times, spread over W ranks."""
    return arguments["tensor"], (size - 1) / size * arguments["tensor"].numel(), False


def _all_gather(arguments: dict[str, Any], size: int, rank: int) -> Description:
    tensor = arguments["input_tensor" if "input_tensor" in arguments else "tensor"]
    return tensor, (size - 1) * tensor.numel(), False


def _reduce_scatter(arguments: dict[str, Any], size: int, rank: int) -> Description:
    output = arguments["output"]
    return output, (size - 1) * output.numel(), False


def _all_to_all_single(arguments: dict[str, Any], size: int, rank: int) -> Description:
    tensor, parts = arguments["input"], arguments["input_split_sizes"]
    kept = parts[rank] if parts else tensor.numel() / size
    return tensor, tensor.numel() - kept, bool(parts)


_OPERATIONS: dict[str, Callable[[dict[str, Any], int, int], Description]] = {
    "all_reduce": _all_reduce,
    "reduce": _to_or_from_one,
    "broadcast": _to_or_from_one,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all_single,
}
