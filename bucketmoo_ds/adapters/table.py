"""The frameworks that there are adapters for: one entry each, that everything reads which has to know them all.

`bucketmoo_ds.<name>`, the planner, benchmarks, tests and a check of docs/ go through it. It imports no framework.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from bucketmoo_ds.errors import ConfigError, MissingPackageError, did_you_mean, one_of

if TYPE_CHECKING:  # `bucketmoo plan` starts without torch
    import torch
    from torch import nn

    # A model, its repeated layers, the dtype of gradients on the wire, and bytes of a bucket where one can choose.
    Wrap = Callable[[nn.Module, Sequence[nn.Module], torch.dtype, int], nn.Module]

EVERY_MICRO_STEP = "every micro-step"
ONCE_A_WINDOW = "once a window"
EITHER = "either"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framework:
    """One way to train, and what it sends.

    Args:
        name: what options and files call it.
        title: what tables call it.
        public: what users call, below `bucketmoo_ds`.
        module: the adapter's.
        stage: of DeepSpeed's ZeRO.
        plain: how it reduces gradients without us: `all-reduce`, `reduce-scatter`, or nothing, in one process.
        exchanged: how often we exchange gradients: `EVERY_MICRO_STEP`; `ONCE_A_WINDOW`, where each rank adds up its
            micro-steps; or `EITHER`, which `register(..., once_a_window=...)` decides.
        combined: how the combined gradient travels on: `all-gather`, to all ranks; `owners`, to those that the
            framework's partitions belong to; `replicas`, to those that hold the same shard; or not at all.
        no_replicas: why there are no replicas of sharded ranks; "" where there can be.
        wrap: wraps a model for benchmarks and tests, layer by layer where the framework shards; `None` where the
            framework makes an engine of it.
    """

    name: str
    title: str
    public: str
    module: str
    stage: int | None = None
    plain: str = ""
    exchanged: str = EVERY_MICRO_STEP
    combined: str = ""
    no_replicas: str = "it has no 2-D mesh"
    wrap: Wrap | None = None

    def load(self) -> ModuleType:
        """Returns the adapter's module, which imports the framework.

        Raises:
            MissingPackageError: the framework is not installed.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != self.name:
                raise
            raise MissingPackageError(
                f"bucketmoo_ds.{self.public} needs {self.name}, which is not installed: pip install "
                f'"bucketmoo-ds[{self.name}]"; torch\'s own wrappers (FSDP2, DDP, one process) need nothing more'
            ) from error


def _fsdp2(model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, bucket_bytes: int) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def _fsdp1(model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, bucket_bytes: int) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in layers}),
        mixed_precision=MixedPrecision(param_dtype=dtype, cast_root_forward_inputs=False),
        device_id=next(model.parameters()).device,
        use_orig_params=True,
    )


def _ddp(model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, bucket_bytes: int) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model.to(dtype), bucket_cap_mb=bucket_bytes / 2**20, gradient_as_bucket_view=True)


def _unwrapped(model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, bucket_bytes: int) -> nn.Module:
    return model.to(dtype)


_Zero = functools.partial(Framework, name="deepspeed", public="initialize", module="bucketmoo_ds.adapters.deepspeed")


FRAMEWORKS: tuple[Framework, ...] = (
    Framework(
        name="fsdp2",
        title="FSDP2",
        public="fsdp2.register",
        module="bucketmoo_ds.adapters.fsdp2",
        plain="reduce-scatter",
        exchanged=EITHER,
        combined="replicas",
        no_replicas="",
        wrap=_fsdp2,
    ),
    Framework(
        name="fsdp1",
        title="FSDP1",
        public="fsdp1.register",
        module="bucketmoo_ds.adapters.fsdp1",
        plain="reduce-scatter",
        exchanged=EITHER,
        no_replicas="its HYBRID strategies take no hook",
        wrap=_fsdp1,
    ),
    Framework(
        name="ddp",
        title="DDP",
        public="ddp.register",
        module="bucketmoo_ds.adapters.ddp",
        plain="all-reduce",
        exchanged=EITHER,
        combined="all-gather",
        wrap=_ddp,
    ),
    Framework(
        name="single",
        title="one process",
        public="single.register",
        module="bucketmoo_ds.adapters.single",
        wrap=_unwrapped,
    ),
    _Zero(title="ZeRO-0", stage=0, plain="all-reduce", exchanged=ONCE_A_WINDOW, combined="all-gather"),
    _Zero(title="ZeRO-1", stage=1, plain="all-reduce", exchanged=ONCE_A_WINDOW, combined="owners"),
    _Zero(title="ZeRO-2", stage=2, plain="all-reduce", combined="owners"),
    _Zero(title="ZeRO-3", stage=3, plain="reduce-scatter"),
)


def names() -> tuple[str, ...]:
    """Returns the names, each once."""
    return tuple(dict.fromkeys(each.name for each in FRAMEWORKS))


def find(name: str, stage: int | None = None) -> Framework:
    """Returns the entry of a framework, and of a stage where it has any.

    Raises:
        ConfigError: there is none; the message names the setting.
    """
    if name not in names():
        raise ConfigError(f'framework = "{name}": unknown, expected {one_of(names())}{did_you_mean(name, names())}')
    stages = {each.stage: each for each in FRAMEWORKS if each.name == name}
    if stage in stages:
        return stages[stage]
    if None in stages:
        staged = [each.name for each in FRAMEWORKS if each.stage is not None]
        raise ConfigError(f'stage = {stage}: "{name}" has no stages; use framework = "{staged[0]}"')
    *first, last = map(str, stages)
    raise ConfigError(f'stage = {stage}: expected {", ".join(first)} or {last}, the stage of framework = "{name}"')
