"""What is worked out about the segments of a bucket: once, for they stay the same from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def kept(spans: Tensor, cells: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Returns what `make` gives for these segments and this key. It lives as long as `spans` does, and is made anew
    where they were written to."""
    plans = spans.__dict__.setdefault("_bucket_moo_plans", {})
    versions = spans._version, cells._version
    known = plans.get(key)
    if known is None or known[0] is not cells or known[1] != versions:
        known = plans[key] = cells, versions, make()
    made: T = known[2]
    return made
