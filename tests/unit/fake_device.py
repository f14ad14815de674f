"""An accelerator that notes what is asked of it: tensors that say they are on it, while their numbers lie in host
memory. It counts kernels, and every time that the host reads from it or copies to it through pageable memory."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone", 0)

# What gives the host a number that a kernel has made, by way of a wait.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal")
# What starts no kernel.
VIEWS = (
    "view", "_unsafe_view", "expand", "select", "slice", "transpose", "t", "permute", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "detach", "alias", "diagonal", "unbind", "as_strided", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "_reshape_alias", "narrow", "lift_fresh",
)  # fmt: skip


class Event:
    """What a stream records.

    Attributes:
        waits: how often the host has waited for one.
    """

    waits = 0

    def record(self) -> None:
        """Nothing runs later here."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Event.waits += 1


class Stream:
    """A queue that runs at once."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """Nothing runs later here."""

    def record_event(self) -> Event:
        return Event()


class _Module(_DummyBackendModule):
    Event, Stream = Event, Stream

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(device)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        yield


def install() -> None:
    """Tells torch of the device, for good."""
    _setup_privateuseone_for_python_backend(backend_module=_Module())


class OnDevice(Tensor):
    """A tensor of the device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device's mode")


class FakeDevice(TorchDispatchMode):
    """Runs what is called inside the `with` block.

    Attributes:
        kernels: by operation.
        reads: operations by which the host waited for the device.
        pageable: how many copies to the device could not be queued.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.reads: collections.Counter[str] = collections.Counter()
        self.pageable = 0
        self._pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().split("::")[1].split(".")[0]
        given = list(_on_device((args, kwargs)))
        target = kwargs.get("device")
        goes = target is not None and torch.device(target).type == DEVICE.type
        if goes:
            kwargs["device"] = torch.device("cpu")
        self._note(name, args, kwargs, given, target)
        numbers = pytree.tree_map_only(OnDevice, lambda each: each.numbers, (args, kwargs))
        result = func(*numbers[0], **numbers[1])
        stays = goes or (bool(given) and (target is None or goes))
        if not stays or (name == "copy_" and not isinstance(args[0], OnDevice)):
            return result
        known = {id(each.numbers): each for each in given}  # what is written in place, or returned as it is

        def back(numbers: Tensor) -> Tensor:
            return known[id(numbers)] if id(numbers) in known else OnDevice(numbers)

        return pytree.tree_map_only(Tensor, back, result)

    def _note(self, name: str, args: Any, kwargs: dict[str, Any], given: list[OnDevice], target: Any) -> None:
        if kwargs.pop("pin_memory", False):
            kwargs["pin_memory"] = False  # there is no device to pin it for
        if not given:
            self.pageable += name == "_to_copy" and target is not None and torch.device(target).type == DEVICE.type \
                and not kwargs.get("non_blocking")
            return
        into_host = name == "copy_" and not isinstance(args[0], OnDevice)
        if name in READS or _by_boolean(name, args) or (target is not None and torch.device(target).type == "cpu"):
            self.reads[name] += 1
        elif into_host:
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.reads["copy_"] += 1
        elif name not in VIEWS:
            self.kernels[name] += 1


def _by_boolean(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose size the host has to know."""
    return name.startswith("index") and any(
        isinstance(each, Tensor) and each.dtype == torch.bool for each in pytree.tree_leaves(args[1:2])
    )


def _on_device(tree: Any) -> Iterator[OnDevice]:
    yield from (each for each in pytree.tree_leaves(tree) if isinstance(each, OnDevice))
