"""What the worker scripts other than the comparison build their engines with, and how they train a window."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import toy
import worker

LANGUAGES = ("de", "fr", "pl")


def settings(
    stage: int,
    *,
    micro_steps: int = 1,
    dtype: str = "fp32",
    offload: bool = False,
    moo: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A DeepSpeed JSON with several buckets; `moo` is its bucket_moo section, or `None` for none."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": toy.SEQUENCES,
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1500},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }
    if stage == 3:  # by default all of the toy model would be kept whole
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if moo is not None:
        config["bucket_moo"] = {"languages": list(LANGUAGES)} | moo
    return config


def make_engine(config: dict[str, Any], *, seed: int, optimizer: type = torch.optim.Adam, **model: Any) -> Any:
    """An engine of a fresh toy model, the same on all ranks, through plain `deepspeed.initialize`."""
    torch.manual_seed(seed)
    module = toy.ToyLM(**model)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer(module.parameters(), lr=0.01), config=config
    )
    return engine


def generator_for(seed: int) -> torch.Generator:
    """A source of data that differs from rank to rank."""
    return torch.Generator().manual_seed(1000 * seed + worker.RANK)


def language_of(step: int) -> int:
    """The language of this rank's micro-batch; all ranks move on together."""
    return (worker.RANK + step) % len(LANGUAGES)


def train_window(engine: Any, generator: torch.Generator, window: int = 0, **entries: Any) -> None:
    """One window. ZeRO-1 keeps one language a rank."""
    for step in range(engine.gradient_accumulation_steps()):
        language = language_of(window if engine.zero_optimization_stage() == 1 else window + step)
        batch = toy.micro_batch(language, generator)
        engine.backward(engine(**batch, language=LANGUAGES[language], **entries))
        engine.step()
