"""What cannot be combined with bucket_moo under DeepSpeed: refused at start-up, with the reason and the way out.

Each entry reads DeepSpeed's own parsed configuration (0.19.8); some of these paths replace the reduction, so that
the run would silently train by averaging.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from bucketmoo_ds.errors import ConfigError

# (setting, whether it is on, why not, what to do)
Refusal = tuple[str, Callable[[Any], bool], str, str]

REFUSALS: tuple[Refusal, ...] = (
    (
        "zero_optimization.stage",
        lambda c: c.zero_config.stage not in (1, 2),
        "the gradients of languages are resolved inside the reduction of ZeRO-1 and ZeRO-2",
        'set "stage": 2 (or 1)',
    ),
    (
        "zero_optimization.offload_optimizer",
        lambda c: c.zero_config.offload_optimizer is not None and c.zero_config.offload_optimizer.device != "none",
        "the combined gradient is written to the accelerator's partition, which offload moves away",
        "remove it",
    ),
    (
        "zero_optimization.contiguous_gradients = false",
        lambda c: not c.zero_config.contiguous_gradients,
        "ZeRO-1 then registers no gradient hooks",
        "remove it (the default is true)",
    ),
    (
        "managed_gradient_accumulation = false",
        lambda c: not c.managed_gradient_accumulation,
        "the boundary of a window is then unknown during backward",
        "set gradient_accumulation_steps",
    ),
    (
        "zero_optimization.zenflow",
        lambda c: c.zero_config.zenflow is not None,
        "ZenFlow replaces the reduction",
        "remove it",
    ),
    (
        "compile.deepcompile",
        lambda c: bool(c.compile_config.deepcompile),
        "DeepCompile replaces the reduction",
        "remove it",
    ),
    (
        "prescale_gradients",
        lambda c: bool(c.prescale_gradients),
        "scaling of gradients is part of their per-language mean",
        "remove it",
    ),
    (
        "gradient_predivide_factor",
        lambda c: float(c.gradient_predivide_factor) != 1.0,
        "scaling of gradients is part of their per-language mean",
        "remove it",
    ),
    (
        "fp16.enabled",
        lambda c: bool(c.float16_config.enabled),
        "a window's overflow is only proven to be found and skipped with bf16 and float32",
        'use "bf16": {"enabled": true}',
    ),
    (
        "torch_autocast.enabled",
        lambda c: bool(c.torch_autocast_enabled),
        "gradients of several dtypes are then exchanged apart from each other",
        "use bf16.enabled",
    ),
)


def refuse_settings(parsed: Any, moo_enabled_by: str) -> None:
    """Raises `ConfigError` for the first DeepSpeed setting that cannot be combined with bucket_moo.

    Args:
        parsed: the `DeepSpeedConfig`.
        moo_enabled_by: names the setting that asked for bucket_moo.
    """
    for setting, is_on, reason, way_out in REFUSALS:
        if is_on(parsed):
            raise ConfigError(f"{setting} cannot be combined with {moo_enabled_by}: {reason}; {way_out}")


def refuse_engine(engine: Any, optimizer_class: type, engine_class: type) -> None:
    """Raises `ConfigError` where DeepSpeed built something else than the classes that the adapter extends."""
    found: type = type(engine)
    if found is not engine_class:
        raise ConfigError(
            f"bucket_moo works with {engine_class.__name__}, DeepSpeed built {found.__name__} (pipeline and "
            "hybrid engines reduce gradients elsewhere); use a plain module"
        )
    optimizer: Any = engine.optimizer
    built: type = type(optimizer)
    if built is not optimizer_class:
        raise ConfigError(
            f"bucket_moo works with DeepSpeed's {optimizer_class.__name__}, this configuration built "
            f"{built.__name__}; pass an optimizer, and use ZeRO stage 1 or 2"
        )
    for what, is_on in (
        ("mixture-of-experts layers", engine.has_moe_layers),
        ("sequence parallelism", engine.sequence_parallel_size > 1),
        ("tensor or pipeline parallelism (mpu)", engine.mpu is not None),
        ("gradient_allreduce_op = sum", not optimizer.gradient_average),
        ("embeddings with sparse=True", any(getattr(m, "sparse", False) for m in engine.module.modules())),
        ("the Muon optimizer", any(getattr(p, "use_muon", False) for group in optimizer.bit16_groups for p in group)),
    ):
        if is_on:
            raise ConfigError(f"bucket_moo cannot be combined with {what}: gradients are then reduced another way")


# The methods that the adapter overrides or calls, with the parameters that 0.19.8 gives them.
SEAMS: dict[str, dict[str, tuple[str, ...]]] = {
    "engine": {
        "_backward_prologue": ("self",),
        "_backward_epilogue": ("self",),
        "is_gradient_accumulation_boundary": ("self",),
    },
    "optimizer": {
        "process_gradients": ("self", "param", "i"),
        "independent_gradient_partition_epilogue": ("self",),
        "check_overflow": ("self", "partition_gradients"),
        "step": ("self", "closure"),
        "_build_compact_grad_partition_buffer": ("self", "group_idx"),
    },
}


def check_seams(engine_class: type, optimizer_class: type) -> None:
    """Raises `ConfigError` where this DeepSpeed lacks a method that the adapter builds on, or has changed its
    parameters."""
    for owner, methods in ((engine_class, SEAMS["engine"]), (optimizer_class, SEAMS["optimizer"])):
        for name, expected in methods.items():
            method = getattr(owner, name, None)
            found = tuple(inspect.signature(method).parameters) if method is not None else None
            if found != expected:
                raise ConfigError(
                    f"this DeepSpeed's {owner.__name__}.{name} has parameters {found}, expected {expected}: install "
                    "a version that bucketmoo_ds supports (0.19.8 is tested)"
                )
