"""What a benchmark must know of the machine: the size of its last cache, and how much memory is free."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

MEBI = 1 << 20
UNKNOWN_CACHE = 32 * MEBI  # where the system does not say: what servers have at least

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMORY = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def cache_bytes(device: torch.device) -> int:
    """Returns the bytes of the cache next to memory: L2 of a GPU, L3 of a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text(encoding="utf-8").strip() for path in _CACHES.glob("index*/size")]
    found = [re.fullmatch(r"(\d+)([KM])", size) for size in sizes]
    return max(
        (int(match[1]) << {"K": 10, "M": 20}[match[2]] for match in found if match is not None), default=UNKNOWN_CACHE
    )


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be allocated on a device; of a CPU in a container, no more than its limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [path.read_text(encoding="utf-8").strip() for path in _LIMITS if path.exists()]
    return min([_available(), *(int(limit) for limit in limits if limit.isdigit())])


def _available() -> int:
    text = _MEMORY.read_text(encoding="utf-8") if _MEMORY.exists() else ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) << 10 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
