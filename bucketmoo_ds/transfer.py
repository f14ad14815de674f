"""Small tensors between the host and a device, without a wait: they go through pinned memory, and what comes back is
waited for when it is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Tensor | Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers of the host as a tensor on a device. On an accelerator the host does not wait for the copy."""
    there = torch.as_tensor(numbers, dtype=dtype)
    if device.type in ("cpu", "meta"):
        return there.to(device)
    return pinned(there.shape, dtype).copy_(there).to(device, non_blocking=True)


class ToHost:
    """A tensor on its way to the host. The copy is queued at once, behind what makes the tensor, and nothing waits for
    it until it is read.

    Args:
        tensor: on any device; on the CPU it is there already.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._tensor = tensor.detach()
        if tensor.device.type != "cpu":
            self._tensor = pinned(tensor.shape, tensor.dtype).copy_(self._tensor, non_blocking=True)
            self._event = torch.get_device_module(tensor.device).Event()
            self._event.record()

    def read(self) -> Tensor:
        """Returns the tensor on the host, and waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns memory of the host that a device copies from and to by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)
