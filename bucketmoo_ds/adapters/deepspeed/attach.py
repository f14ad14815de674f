"""Switches bucket_moo on for every DeepSpeed engine whose JSON has the section, however the engine is made.

`install` wraps `DeepSpeedEngine.__init__`: so `deepspeed.initialize` works unchanged, also where it was imported by
name before this package was, and where Accelerate or Trainer call it. An engine whose configuration has no
`bucket_moo` section, or one with `"enabled": false`, is left exactly as DeepSpeed made it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import deepspeed
import hjson
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from bucketmoo_ds.adapters.deepspeed import checks, late, mixed, seams
from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine
from bucketmoo_ds.adapters.deepspeed.extension_locks import warn_of_old_locks
from bucketmoo_ds.adapters.deepspeed.zero0 import ReplicatedEngine, ReplicatedReduction
from bucketmoo_ds.adapters.deepspeed.zero3 import BucketMOOZero3Optimizer, ShardReduction
from bucketmoo_ds.adapters.deepspeed.zero12 import BucketMOOZeroOptimizer, PartitionReduction
from bucketmoo_ds.config import SECTION, BucketMOOConfig, check_section_name
from bucketmoo_ds.data import switched_on
from bucketmoo_ds.data.batch import LanguageTracker
from bucketmoo_ds.logs import logger, show_by_default
from bucketmoo_ds.ops import choose_backend
from bucketmoo_ds.patches import when_imported, wrap
from bucketmoo_ds.plan.blocks import Parameter, granularity_of, plain_name, plan_blocks
from bucketmoo_ds.plan.choices import create_aggregator, create_exchange


class Stage(NamedTuple):
    """What a stage's engine, optimizer and reduction become; without ZeRO the optimizer stays as it is."""

    engine: type[BucketMOOEngine]
    optimizer: type | None
    reduction: Any


# By the optimizer that DeepSpeed has built. On ZeRO-0 it is the user's own, or one of its two for 16 bits.
STAGES: dict[type, Stage] = {
    DeepSpeedZeroOptimizer: Stage(BucketMOOEngine, BucketMOOZeroOptimizer, PartitionReduction),
    DeepSpeedZeroOptimizer_Stage3: Stage(BucketMOOEngine, BucketMOOZero3Optimizer, ShardReduction),
    FP16_Optimizer: Stage(ReplicatedEngine, None, ReplicatedReduction),
    FP16_UnfusedOptimizer: Stage(ReplicatedEngine, None, ReplicatedReduction),
    torch.optim.Optimizer: Stage(ReplicatedEngine, None, ReplicatedReduction),
}


def install() -> None:
    """Wraps DeepSpeed's engine, once, whoever else has wrapped it; and Accelerate's reading of `"auto"`.

    This happens when DeepSpeed is imported, so before it builds anything.
    """
    wrap(DeepSpeedEngine, "__init__", _initialize_engine)
    wrap(DeepSpeedEngine, "_do_args_sanity_check", _refuse_early)
    wrap(DeepSpeedEngine, "_do_optimizer_sanity_check", _choose_optimizer)
    when_imported("accelerate.utils.dataclasses", _keep_auto)
    warn_of_old_locks()
    late.stop_late_engines()


def _keep_auto(accelerate: ModuleType) -> None:
    """Accelerate wants a value of its own for every `"auto"` in a DeepSpeed JSON; those of our section stay."""
    wrap(accelerate.DeepSpeedPlugin, "fill_match", _fill_match)


def _fill_match(wrapped: Any, plugin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    key = args[0] if args else kwargs["ds_key_long"]
    if not key.startswith(f"{SECTION}."):
        wrapped(*args, **kwargs)


def initialize(*args: Any, **kwargs: Any) -> Any:
    """`deepspeed.initialize`, with the same arguments and the same four return values.

    The engine resolves conflicts where the JSON's `bucket_moo` section asks for it.

    Raises:
        ConfigError: the section is invalid, or cannot be combined with another setting of the JSON.
    """
    return deepspeed.initialize(*args, **kwargs)


def read_section(raw: Mapping[str, Any]) -> BucketMOOConfig | None:
    """Returns the settings of a DeepSpeed JSON, or `None` where bucket_moo is not switched on.

    Raises:
        ConfigError: a misspelt or invalid section.
    """
    check_section_name(raw)
    config = BucketMOOConfig.from_section(raw.get(SECTION))
    if config is not None:
        create_aggregator(config)
        granularity_of(config)
        choose_backend(config.backend, get_accelerator().device_name())
    return config


def attach(engine: DeepSpeedEngine, config: BucketMOOConfig) -> None:
    """Makes a finished engine resolve conflicts.

    Raises:
        ConfigError: the engine reduces gradients in a way that the adapter does not know.
    """
    stage = checks.refuse_engine(engine, DeepSpeedEngine, STAGES)
    optimizer = engine.optimizer
    if stage.optimizer is None:
        checks.refuse_loss_scale(optimizer)
    engine.__class__ = stage.engine
    engine.moo_config = config
    engine.language_tracker = LanguageTracker(config, engine.module)
    engine._moo_states = {}
    group = engine.seq_data_parallel_group
    exchange = create_exchange(config, group)
    if stage.optimizer is None:
        engine.reduction = stage.reduction(engine, exchange)
    else:
        plan = plan_blocks(_parameters(engine), int(optimizer.reduce_bucket_size), granularity_of(config))
        optimizer.__class__ = stage.optimizer
        engine.reduction = optimizer.reduction = stage.reduction(engine, optimizer, plan, exchange)
    switched_on.note(engine)
    show_by_default()
    if exchange.rank == 0:
        logger.info(engine.moo.describe())
        for bucket in engine.moo.plan.buckets:
            logger.debug("bucket_moo: %s, %d elements", bucket.name, bucket.numel)


def _parameters(engine: DeepSpeedEngine) -> list[Parameter]:
    """The parameters that a ZeRO optimizer has taken, in the model's order."""
    optimizer: Any = engine.optimizer
    sharded = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    groups = optimizer.fp16_groups if sharded else optimizer.bit16_groups
    taken = {param for group in groups for param in group if param.requires_grad}
    numels = {param: int(param.ds_numel if sharded else param.numel()) for param in taken}
    return [
        Parameter(plain_name(optimizer.param_names[param]), numels[param])
        for param in engine.module.parameters()
        if numels.get(param, 0) > 0
    ]


def _initialize_engine(wrapped: Any, engine: DeepSpeedEngine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wrapped(*args, **kwargs)
    config = _asked_for(engine)
    if config is not None:
        checks.refuse_gathers(engine.zero_optimization_stage(), dist.get_backend(), dist.get_world_size())
    if config is not None and config.mode == "mixed":
        mixed.attach(engine, config)
    elif config is not None and not isinstance(engine, BucketMOOEngine):
        attach(engine, config)
    elif config is None and SECTION in _json_of(engine):
        switched_on.note(engine)  # told to average


def _refuse_early(wrapped: Any, engine: DeepSpeedEngine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """DeepSpeed calls this as soon as the engine has its configuration, and before it builds anything."""
    _asked_for(engine)
    return wrapped(*args, **kwargs)


def _asked_for(engine: DeepSpeedEngine) -> BucketMOOConfig | None:
    """The settings of an engine that is to resolve conflicts. They are read from the engine, not from the arguments,
    which callers, subclasses and foreign wrappers pass on in many ways.

    Raises:
        ConfigError: see `read_section`; or what DeepSpeed is set to, or its version, cannot be combined with it.
    """
    config = read_section(_json_of(engine))
    if config is not None and config.mode != "mixed":
        seams.check_seams(deepspeed.__version__, DeepSpeedEngine, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
        checks.refuse_settings(engine._config, SECTION)
    return config


def _json_of(engine: DeepSpeedEngine) -> Mapping[str, Any]:
    """What the engine was configured with, in the three ways that DeepSpeed takes it: parsed, a file, or base64."""
    if isinstance(engine.config, Mapping):
        return engine.config
    if engine.config is None:  # DeepSpeed's class was called with what `DeepSpeedConfig` has parsed, and nothing else
        return engine._config._param_dict
    if Path(engine.config).exists():
        return hjson.loads(Path(engine.config).read_text(encoding="utf-8"))
    return hjson.loads(base64.urlsafe_b64decode(engine.config).decode())


def _choose_optimizer(wrapped: Any, engine: DeepSpeedEngine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """ZeRO-1 with bf16 and float32 accumulation: DeepSpeed would take BF16_Optimizer, which reduces gradients elsewhere
    and in buckets of a fixed size; its ZeRO-1 optimizer does the same with the same settings."""
    chosen = wrapped(*args, **kwargs)
    if chosen == BFLOAT16 and engine.zero_optimization():
        config = read_section(_json_of(engine))
        if config is not None and config.mode != "mixed":
            return ZERO_OPTIMIZATION
    return chosen
