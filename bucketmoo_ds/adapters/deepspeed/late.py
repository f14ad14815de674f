"""Engines that were made before this package was imported, from a JSON that asks for it.

Nothing was wrapped then, so that they average. They are looked for once, when the adapter is imported, and stop the run
when they would train.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from bucketmoo_ds.config import SECTION, BucketMOOConfig, check_section_name
from bucketmoo_ds.errors import BucketMOOError, ConfigError


def stop_late_engines() -> None:
    """Makes `backward` and `step` of all living engines raise whose JSON has the section, or one that looks like it.

    The import itself raises nothing: an engine that trains no more harms nobody.
    """
    if not deepspeed.comm.is_initialized():  # which an engine needs; going through all objects takes a moment
        return
    kinds = set(_kinds(DeepSpeedEngine))
    # An object's own `__class__` may be a property with effects, which isinstance would ask; its type is not.
    for found in [each for each in gc.get_objects() if type(each) in kinds]:
        raw = getattr(getattr(found, "_config", None), "_param_dict", None)
        problem = _problem(raw) if isinstance(raw, Mapping) else None
        if problem is not None:
            _stop(found, problem)


def _kinds(kind: Any) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


def _problem(raw: Mapping[str, Any]) -> str | None:
    try:
        check_section_name(raw)
        config = BucketMOOConfig.from_section(raw.get(SECTION))
    except ConfigError as error:
        return str(error)
    return f'"{SECTION}" in its JSON was not read' if config is not None else None


def _stop(engine: DeepSpeedEngine, problem: str) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise BucketMOOError(
            f"this DeepSpeed engine averages, for it was made before bucketmoo_ds was imported: {problem}. Import "
            f'bucketmoo_ds before deepspeed.initialize; to average, take "{SECTION}" out or set "enabled": false'
        )

    engine.backward = engine.step = refuse
