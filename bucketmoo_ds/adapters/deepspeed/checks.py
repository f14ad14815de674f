"""What cannot be combined with bucket_moo under DeepSpeed: refused at start-up, with the reason and the way out.

Each entry reads DeepSpeed's own parsed configuration, in which older versions lack some settings; some of these paths
replace the reduction, so that the run would silently train by averaging.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from deepspeed.runtime.zero.partition_parameters import Init

from bucketmoo_ds.errors import ConfigError, one_of

T = TypeVar("T")

# (setting, whether it is on, why not, what to do)
Refusal = tuple[str, Callable[[Any], bool], str, str]

REFUSALS: tuple[Refusal, ...] = (
    (
        "zero_optimization.contiguous_gradients = false",
        lambda c: not c.zero_config.contiguous_gradients and c.zero_config.stage in (1, 2),
        "ZeRO-1 then registers no gradient hooks, and ZeRO-2 reduces gradients elsewhere",
        "remove it (the default is true)",
    ),
    (
        "managed_gradient_accumulation = false",
        lambda c: not getattr(c, "managed_gradient_accumulation", True),
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
        "zero_optimization.zero_quantized_gradients",
        lambda c: bool(c.zero_config.zero_quantized_gradients),
        "quantised gradients are added up inside an exchange of their own",
        "remove it",
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        lambda c: bool(getattr(c.zero_config.offload_optimizer, "super_offload", False)),
        "SuperOffload replaces the reduction",
        "remove it (offload_optimizer without it works)",
    ),
    (
        "zero_optimization.ignore_unused_parameters = false with offload_optimizer",
        lambda c: (
            not c.zero_config.ignore_unused_parameters
            and c.zero_config.stage in (1, 2)
            and getattr(c.zero_config.offload_optimizer, "device", "none") != "none"
        ),
        "every parameter of a bucket gets a combined gradient, so that DeepSpeed cannot see which ones were unused",
        "remove it (the default is true)",
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
        "gradient_allreduce_op = sum",
        lambda c: getattr(c, "gradient_allreduce_op", "mean") == "sum",
        "scaling of gradients is part of their per-language mean",
        "remove it (the default is mean)",
    ),
    (
        "fp16.enabled with zero_optimization.stage = 0",
        lambda c: bool(c.float16_config.enabled) and c.zero_config.stage == 0,
        "DeepSpeed 0.19.8 then divides gradients by a loss scale that it has not multiplied the loss by",
        "use stage 1, 2 or 3, or bf16.enabled",
    ),
    (
        "torch_autocast.dtype = float16",
        lambda c: bool(c.torch_autocast_enabled) and c.torch_autocast_dtype == torch.float16,
        "its gradients are scaled by a GradScaler of its own, outside of a window's overflow check",
        'use "dtype": "bfloat16", or fp16.enabled',
    ),
    (
        "torch_autocast.enabled with zero_optimization.stage = 3",
        lambda c: bool(c.torch_autocast_enabled) and c.zero_config.stage == 3,
        "ZeRO-3 then gathers parameters in autocast's dtype, and gradients differed from the reference by 1 %",
        "use stage 1 or 2, or bf16.enabled",
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


def refuse_engine(engine: Any, engine_class: type, known: Mapping[type, T]) -> T:
    """Returns what `known` has for the engine's optimizer.

    Raises:
        ConfigError: DeepSpeed built something else than the classes that the adapter extends.
    """
    kind: type = type(engine)
    if kind is not engine_class:
        raise ConfigError(
            f"bucket_moo works with {engine_class.__name__}, DeepSpeed built {kind.__name__} (pipeline and "
            "hybrid engines reduce gradients elsewhere); use a plain module"
        )
    optimizer: Any = engine.optimizer
    built: type = type(optimizer)
    # Any optimizer of the user's is one; a subclass of DeepSpeed's own reduces gradients in another way.
    found = known.get(torch.optim.Optimizer if isinstance(optimizer, torch.optim.Optimizer) else built)
    if found is None:
        raise ConfigError(
            f"bucket_moo does not know DeepSpeed's {built.__name__}; it works with "
            f"{one_of([each.__name__ for each in known])}: pass an optimizer, and use ZeRO stage 0, 1, 2 or 3"
        )
    for what, is_on in (
        ("mixture-of-experts layers", engine.has_moe_layers),
        ("sequence parallelism", engine.sequence_parallel_size > 1),
        ("tensor or pipeline parallelism (mpu)", engine.mpu is not None),
        ("embeddings with sparse=True", any(getattr(m, "sparse", False) for m in engine.module.modules())),
        ("1-bit optimizers", ".onebit." in built.__module__),
        ("the Muon optimizer", any(getattr(param, "use_muon", False) for param in engine.module.parameters())),
    ):
        if is_on:
            raise ConfigError(f"bucket_moo cannot be combined with {what}: gradients are then reduced another way")
    return found


def refuse_loss_scale(optimizer: Any) -> None:
    """Raises `ConfigError` where an optimizer of ZeRO-0 divides gradients by a loss scale: nothing multiplies by it."""
    if (getattr(optimizer, "loss_scale", None) or 1.0) != 1.0:
        raise ConfigError(
            "bf16.enabled with zero_optimization.stage = 0 cannot be combined with bucket_moo: "
            f"{type(optimizer).__name__} of DeepSpeed before 0.18.6 divides gradients by a loss scale that nothing has "
            "multiplied the loss by; install a later one, or use stage 1, 2 or 3"
        )


def refuse_gathers(stage: int, backend: str, world_size: int) -> None:
    """Raises `ConfigError` where ZeRO-3 computes with parameters of which some may not have arrived: DeepSpeed before
    0.19.8 waits for the last of several gathers. NCCL ends them in their order, gloo does not.

    Args:
        backend: of torch.distributed.
    """
    if stage != 3 or backend != "gloo" or world_size == 1:
        return
    gathers = getattr(Init, "_allgather_params_coalesced", None)
    if gathers is not None and "launch_handles[-1].wait()" in inspect.getsource(gathers):
        raise ConfigError(
            "zero_optimization.stage = 3 over gloo (on CPUs) cannot be combined with bucket_moo: DeepSpeed before "
            "0.19.8, with or without bucket_moo, then computes with parameters that have not all arrived; install "
            "0.19.8 or later, or use stage 0, 1 or 2"
        )
