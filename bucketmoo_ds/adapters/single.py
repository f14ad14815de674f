"""One process without a wrapper: K languages in the micro-steps of a window, one after the other on one device.

A post-accumulate-grad hook takes every parameter's gradient as soon as it is there and frees it. At the boundary
`.grad` holds the combined gradient, and the optimizer and clipping go on as ever.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from bucketmoo_ds.adapters.session import Session
from bucketmoo_ds.adapters.whole import Whole
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError


def register(
    model: nn.Module,
    config: BucketMOOConfig,
    *,
    micro_steps: int,
    bucket_size: int | None = None,
    on_nonfinite: str = "drop",
) -> Session:
    """Resolves the conflicts of a model's languages in one process.

    Every micro-batch names its language: by an entry of the batch (`config.language_key`), or inside
    `with session.language("de"):`. Divide the loss by `micro_steps` as usual. When the last backward of a window
    returns, `.grad` holds the combined gradient; before that it is `None`.

    Memory: with P trained elements of b bytes each, K languages in a window and r bytes an element of a row
    (`config.row_storage`: 4 on the device, 2 for `bfloat16`; `host` takes the 4 in host memory instead), a window of
    several micro-steps needs at its peak, on top of parameters, optimizer state and activations,

        K P r  (rows)  +  P b  (buckets in flight, later `.grad`)

    on the device, where plain training needs P b. `host` needs the K rows of one bucket there besides, while that
    bucket is combined. A bucket is exchanged when all its gradients have come; so P b is the bound, and one or two
    buckets the rule, where backward uses parameters in the model's order reversed.

    Args:
        model: a plain module on one device.
        config: the settings.
        micro_steps: M, backward passes between two optimizer steps; at least as many as languages are to meet in one.
        bucket_size: elements of a bucket, which is the block of granularity `bucket`; left out, 25 MiB of them.
        on_nonfinite: see `Session`.

    Returns:
        The session: `session.last` is the latest window's resolution.

    Raises:
        ConfigError: there are several processes, the model is wrapped already, or a setting does not allow it.
    """
    _refuse(model)
    adapter = SingleAdapter(
        "single.register",
        model,
        config,
        Exchange(),
        micro_steps=lambda: micro_steps,
        once_a_window=False,
        bucket_size=bucket_size,
    )
    session = Session(model, config, adapter, on_nonfinite)
    adapter.hook()
    return session


def _refuse(model: nn.Module) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"single.register: {dist.get_world_size()} processes, which would train apart from each other; wrap the "
            "model in DDP or apply fully_shard, and use bucketmoo_ds.ddp or bucketmoo_ds.fsdp2"
        )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
            raise ConfigError(
                f"single.register: the model is wrapped ({type(module).__name__}), and the wrapper has a reduction of "
                "its own; use the adapter of that name in bucketmoo_ds, or leave out the wrapper"
            )


class SingleAdapter(Whole):
    """Takes gradients from the parameters themselves."""

    def begin(self) -> None:
        """See `Adapter`."""
        super().begin()
        if self.micro.first:
            self._used = [False] * len(self.parameters)

    def end(self) -> list[bool]:
        """See `Adapter`."""
        contributed = super().end()
        self._used = [before or now for before, now in zip(self._used, contributed, strict=True)]
        return contributed

    def assign(self, index: int, combined: Tensor) -> None:
        """See `Whole`. A parameter that no micro-step of the window used has no gradient, as without us."""
        parameter = self.parameters[index]
        if self._used[index]:
            parameter.grad = combined.to(parameter.dtype)
