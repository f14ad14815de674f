"""On an accelerator, a stream of our own: rows are received, resolved and combined beside the kernels of backward.

Events order the two streams and the host waits for none of them. A bucket's exchange waits for what made the bucket,
and this stream for the exchange, so that nothing here waits for kernels of backward that were queued since. `join`
makes the caller's stream wait for this one.

Memory: what comes from other streams is kept until this one is through with it (`keep`), and goes back to its own
stream's pool then. What this stream allocates may be read by the caller after `join`, and be freed then: `follow` makes
this stream wait for the caller before it writes there again.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """A stream beside the current one, of high priority: its kernels are few, and the next bucket waits for them. On
    the CPU, nothing.

    Args:
        device: whose stream.
        module: torch's module of that kind of device (`torch.cuda`).
    """

    def __init__(self, device: torch.device, module: ModuleType | None = None) -> None:
        self._device = device
        accelerator = torch.accelerator.current_accelerator()
        if module is None and accelerator is not None and accelerator.type == device.type:
            module = torch.get_device_module(device)
        self._module: Any = module
        self._stream = self._module.Stream(device, priority=-1) if self._module is not None else None
        self._kept: collections.deque[tuple[Any, tuple[Tensor, ...]]] = collections.deque()

    def follow(self) -> None:
        """Makes this stream wait for all that was queued on the current one."""
        if self._stream is not None:
            self._stream.wait_stream(self._module.current_stream(self._device))

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Runs the block on the stream, beside what is queued on the current one."""
        if self._stream is None:
            yield
            return
        with self._module.stream(self._stream):
            yield

    def keep(self, *tensors: Tensor) -> None:
        """Keeps tensors of other streams until this one has passed here."""
        if self._stream is None:
            return
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
        self._kept.append((self._stream.record_event(), tensors))

    def join(self) -> None:
        """Makes the current stream wait for all that was queued on this one."""
        if self._stream is not None:
            self._module.current_stream(self._device).wait_stream(self._stream)
            self._kept.clear()
