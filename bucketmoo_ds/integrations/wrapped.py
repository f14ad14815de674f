"""What Trainer or Accelerate has wrapped a model in, and the adapter that takes it."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from bucketmoo_ds.adapters.session import Session, unwrapped
from bucketmoo_ds.adapters.table import find
from bucketmoo_ds.config import BucketMOOConfig

_WRAPPERS = {"fsdp2": FSDPModule, "fsdp1": FullyShardedDataParallel, "ddp": DistributedDataParallel}


def wrapper_of(model: Any) -> str:
    """Returns the name of a model's wrapper in `adapters.table`; `single` where it has none, compiled or not."""
    inner = unwrapped(model)
    return next((name for name, wrapper in _WRAPPERS.items() if isinstance(inner, wrapper)), "single")


def register(model: Any, config: BucketMOOConfig, micro_steps: int, scaler: Any) -> Session:
    """Registers a model with the adapter of its wrapper.

    Args:
        model, config, micro_steps: as the adapters take them.
        scaler: the GradScaler that skips the steps of windows that are not finite; `None` where they are dropped here.
    """
    session: Session = find(wrapper_of(model)).load().register(
        model, config, micro_steps=micro_steps, on_nonfinite="drop" if scaler is None else "keep"
    )
    return session
