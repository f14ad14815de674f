"""Worker: engines that are made while others have wrapped DeepSpeed's `__init__`, in many ways."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import deepspeed
import torch
import toy
import worker
import wrapt
from deepspeed.runtime.engine import DeepSpeedEngine
from setup_engine import settings

import bucketmoo_ds

PLAIN = vars(DeepSpeedEngine)["__init__"].__wrapped__
OPTIMIZER_CHECK = vars(DeepSpeedEngine)["_do_optimizer_sanity_check"]


def with_wrapt(inner: Any) -> Any:
    return wrapt.FunctionWrapper(inner, lambda wrapped, engine, args, kwargs: wrapped(*args, **kwargs))


def with_functools(inner: Any) -> Any:
    @functools.wraps(inner)
    def traced(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)

    return traced


def without_a_trace(inner: Any) -> Any:
    def traced(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)

    return traced


WRAPPERS = {each.__name__: each for each in (with_wrapt, with_functools, without_a_trace)}


class Subclass(DeepSpeedEngine):
    """An engine of the user's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def run(*, before: str | None, after: str | None, how: str, section: bool) -> dict[str, Any]:
    """Installs between two foreign wrappers, twice, and makes an engine; returns how often it was attached."""
    DeepSpeedEngine.__init__ = WRAPPERS[before](PLAIN) if before else PLAIN
    adapter = importlib.import_module("bucketmoo_ds.adapters.deepspeed")
    adapter.install()
    if after:
        DeepSpeedEngine.__init__ = WRAPPERS[after](vars(DeepSpeedEngine)["__init__"])
    module = importlib.reload(sys.modules["bucketmoo_ds.adapters.deepspeed.attach"])
    module.install()
    assert vars(DeepSpeedEngine)["_do_optimizer_sanity_check"] is OPTIMIZER_CHECK
    engine = make(how, settings(2, moo={} if section else None))
    return {"type": type(engine).__name__, "resolves": hasattr(engine, "moo")}


def make(how: str, config: dict[str, Any]) -> Any:
    model = toy.ToyLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if how == "config":
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if how == "config_params":
        return deepspeed.initialize(model=model, optimizer=optimizer, config_params=config)[0]
    if how == "bm.initialize":
        return bucketmoo_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
    parsed = deepspeed.DeepSpeedConfig(config)
    kind = Subclass if how == "subclass" else DeepSpeedEngine
    if how == "keyword":
        return kind(args=None, model=model, optimizer=optimizer, config=config, config_class=parsed)
    return kind(None, model, optimizer, None, None, None, None, None, None, config, parsed)


if __name__ == "__main__":
    worker.serve(run)
