"""What `run.py` loads into every Python process of both its runs, through PYTHONPATH, before DeepSpeed.

With a `bucket_moo` section in the environment, every `deepspeed.initialize` gets it, and every engine its first
language for good: each forward pass counts as one target token, so micro-batches count alike, which is what DeepSpeed's
averaging does.
"""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt


def with_section(config: Any, section: dict[str, Any]) -> Any:
    """Returns a copy of a DeepSpeed configuration, a dictionary or the path of a JSON file, that has the section.

    What is neither is returned as it is: DeepSpeed has to say what is wrong with it.
    """
    if isinstance(config, str | os.PathLike) and Path(config).is_file():
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    return {**config, "bucket_moo": section} if isinstance(config, dict) else config


def switch_on(initialize: Callable[..., Any], section: dict[str, Any]) -> Callable[..., Any]:
    """Returns `deepspeed.initialize` with the section in every configuration and a language on every engine."""
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config = given.get("config") or given.pop("config_params", None)
        config = config or getattr(given.get("args"), "deepspeed_config", None)
        given["config"] = with_section(config, section)
        made = initialize(**given)
        engine = made[0]
        engine.language_of_all_batches = engine.language(section["languages"][0], target_tokens=1)
        engine.language_of_all_batches.__enter__()
        return made

    return wrapper


@wrapt.when_imported("deepspeed")
def prepare(deepspeed: ModuleType) -> None:
    """Keeps DeepSpeed from compiling a collective that gloo does without, and switches bucket_moo on.

    Some tests of bf16 ask for the versions of CUDA and NCCL first, in a way that fails where torch has neither.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.git_version_info.torch_info.update(cuda_version="11.0", nccl_version="2.10")
    section = os.environ.get("DEEPSPEED_TESTS_BUCKET_MOO")
    if section:
        import bucketmoo_ds  # noqa: F401 - teaches DeepSpeed the section

        deepspeed.initialize = switch_on(deepspeed.initialize, json.loads(section))


@wrapt.when_imported("torch.nn.parallel.distributed")
def accept_device_numbers(distributed: ModuleType) -> None:
    """Tests whose reference is DDP give it GPU numbers, which it takes for an error on CPU: they are left out."""

    def without(wrapped: Any, ddp: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wrapped(*args, **{name: value for name, value in kwargs.items() if name not in ("device_ids", "output_device")})

    wrapt.wrap_function_wrapper(distributed.DistributedDataParallel, "__init__", without)


# DeepSpeed's tests fork their workers from a server; one that has DeepSpeed imported saves them most of their time.
multiprocessing.set_forkserver_preload(["deepspeed"])
