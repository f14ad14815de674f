"""On an accelerator, a stream of our own: rows are exchanged, resolved and combined beside the kernels of backward.

Events order the two streams and the host waits for none of them: entering the stream makes it wait for what the caller
has queued so far, and `join` makes the caller's stream wait for it. Where Grams go to the host for the solver, the host
waits for this stream alone, not for the kernels of backward.

Memory: a caller's tensor is recorded on the stream, so that it is not handed out again while the stream reads it. What
the stream allocates may be read by the caller after `join`, and be freed then: the stream waits for the caller before
it writes there again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """A stream beside the current one; on the CPU, nothing.

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
        self._stream = self._module.Stream(device) if self._module is not None else None

    @contextlib.contextmanager
    def after_current(self, *tensors: Tensor) -> Iterator[None]:
        """Runs the block on the stream, after what is queued on the current one.

        Args:
            tensors: of the current stream, read by the block.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(self._module.current_stream(self._device))
        for tensor in tensors:
            tensor.record_stream(self._stream)
        with self._module.stream(self._stream):
            yield

    def join(self) -> None:
        """Makes the current stream wait for all that was queued on this one."""
        if self._stream is not None:
            self._module.current_stream(self._device).wait_stream(self._stream)
