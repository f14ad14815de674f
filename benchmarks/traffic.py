"""Counts the bytes that this rank sends, in two ways that share nothing.

* `record` notes every collective that Python starts on `torch.distributed` (DeepSpeed's and FSDP's go through it too),
  and DDP's all-reduces, which C++ starts, with its elements and dtype, and charges what the standard algorithm sends
  per rank: a ring for a reduction or a gather, the parts for other ranks for an all-to-all. That is the number that
  holds on any machine.
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
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a call is for. Rows and combined pieces are bucket_moo's gradient bytes, reduced gradients the framework's.
GRADIENTS = ("gradients", "rows", "combined")

# What a collective of bucketmoo_ds.comm.exchange is for, and the name under which `Exchange` counts it, by the method.
_EXCHANGE = {
    "scatter": ("rows", "all_to_all"),
    "scatter_by_node": ("rows", "reduce_scatter (node)"),
    "across": ("rows", "all_to_all (nodes)"),
    "all_to_all": ("combined", "all_to_all (combined)"),
    "all_gather": ("combined", "all_gather (combined)"),
    "all_gather_grams": ("grams", "all_gather (Grams)"),
    "all_to_all_grams": ("grams", "all_to_all (Grams)"),
    "_gather": ("control", "all_gather (control)"),
}

_calls: list[Call] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Collects the collectives that start inside the `with` block. `install` must have been called."""
    global _calls  # noqa: PLW0603 - torch.distributed's functions are global, so is who listens to them
    calls: list[Call] = []
    _calls = calls
    try:
        with _Reducer():
            yield calls
    finally:
        _calls = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One collective.

    Args:
        operation: the function of `torch.distributed`.
        purpose: `gradients` (reduced by the framework), `rows` and `combined` (bucket_moo's exchange and delivery),
            `grams`, `parameters` (ZeRO and FSDP gather the updated ones) or `control` (integers, and single numbers
            such as the gradient's norm).
        elements, dtype: of the tensor that this rank put in; of the gathered one for an all-gather.
        group_size: ranks that took part.
        sent_bytes: what this rank sends.
        counter: the name under which bucketmoo_ds.comm.exchange counts it; empty for what the framework does.
        ranks: that took part.
    """

    operation: str
    purpose: str
    elements: int
    dtype: str
    group_size: int
    sent_bytes: int
    counter: str = ""
    ranks: tuple[int, ...] = ()


def install() -> None:
    """Wraps the collectives, once. To be called before DeepSpeed joins the process group: it keeps some of them."""
    for name, describe in _OPERATIONS.items():
        original = getattr(dist, name, None)  # some have a name of their own before torch 2.13, and another after
        if original is not None and not hasattr(original, "_counted"):
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
    """Returns what `Exchange.sent_bytes` must have counted for these calls, in its own words."""
    total: collections.Counter[str] = collections.Counter()
    for call in calls:
        if call.counter:
            total[call.counter] += call.sent_bytes
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


Description = tuple[Tensor, float]


def _counting(name: str, original: Callable[..., Any], describe: Callable[..., Description]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _calls  # noqa: PLW0603
        calls, _calls = _calls, None  # what this call starts in turn is no further one
        if calls is not None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            group = bound.arguments["group"]
            size = dist.get_world_size(group)
            tensor, elements_sent = describe(bound.arguments, size, dist.get_rank(group))
            sent = round(elements_sent * tensor.element_size())
            dtype = str(tensor.dtype).removeprefix("torch.")
            # An all-gather is described by this rank's part; what it fills is `size` of them.
            elements = tensor.numel() * (size if name.startswith("all_gather") else 1)
            caller = sys._getframe(1)
            ours = caller.f_globals["__name__"] == "bucketmoo_ds.comm.exchange"
            purpose, counter = _EXCHANGE[caller.f_code.co_name] if ours else (_purpose(name, tensor), "")
            ranks = tuple(dist.get_process_group_ranks(group))
            calls.append(Call(name, purpose, elements, dtype, size, sent, counter, ranks))
        try:
            return original(*args, **kwargs)
        finally:
            _calls = calls

    counted._counted = True  # type: ignore[attr-defined]
    return counted


def _purpose(operation: str, tensor: Tensor) -> str:
    """Of a framework's collective."""
    if not tensor.is_floating_point() or tensor.numel() == 1:
        return "control"
    return "parameters" if operation.startswith("all_gather") else "gradients"


class _Reducer(TorchDispatchMode):
    """Notes the all-reduces that C++ starts: those of DDP's buckets, among all ranks."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _calls is not None and function is torch.ops.c10d.allreduce_.default:
            size = dist.get_world_size()
            for tensor in args[0]:
                sent = round(2 * (size - 1) / size * tensor.nbytes)
                dtype = str(tensor.dtype).removeprefix("torch.")
                _calls.append(Call("all_reduce", _purpose("all_reduce", tensor), tensor.numel(), dtype, size, sent))
        return function(*args, **(kwargs or {}))


# Each takes (arguments, W, rank) and returns (the tensor, elements that this rank sends).
def _all_reduce(arguments: dict[str, Any], size: int, rank: int) -> Description:
    return arguments["tensor"], 2 * (size - 1) / size * arguments["tensor"].numel()


def _to_or_from_one(arguments: dict[str, Any], size: int, rank: int) -> Description:
    """Broadcast and reduce: a chain sends the tensor W - 1 times, spread over W ranks."""
    return arguments["tensor"], (size - 1) / size * arguments["tensor"].numel()


def _all_gather(arguments: dict[str, Any], size: int, rank: int) -> Description:
    tensor = arguments["input_tensor" if "input_tensor" in arguments else "tensor"]
    return tensor, (size - 1) * tensor.numel()


def _reduce_scatter(arguments: dict[str, Any], size: int, rank: int) -> Description:
    output = arguments["output"]
    return output, (size - 1) * output.numel()


def _all_to_all_single(arguments: dict[str, Any], size: int, rank: int) -> Description:
    tensor, parts = arguments["input"], arguments["input_split_sizes"]
    kept = parts[rank] if parts else tensor.numel() / size
    return tensor, tensor.numel() - kept


_OPERATIONS: dict[str, Callable[[dict[str, Any], int, int], Description]] = {
    "all_reduce": _all_reduce,
    "reduce": _to_or_from_one,
    "broadcast": _to_or_from_one,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather,
    "all_gather_single": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter,
    "all_to_all_single": _all_to_all_single,
}
