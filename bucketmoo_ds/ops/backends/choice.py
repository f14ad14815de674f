"""The one choice point among the backends: the environment, then the argument, then `using`, then what is there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pkgutil
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of
from bucketmoo_ds.logs import logger
from bucketmoo_ds.ops import backends

ENVIRONMENT = "BUCKETMOO_BACKEND"

_setting: ContextVar[str] = ContextVar("bucketmoo_backend", default="auto")


def choose_backend(setting: str = "auto", device: torch.device | str = "cpu") -> str:
    """Returns the name of the backend that will run on a device.

    The environment variable `BUCKETMOO_BACKEND` wins over the setting. An explicit choice is honoured or raises; the
    automatic one is logged once a device, with a warning where one that comes first cannot run here.

    Raises:
        ConfigError: the name is not known, or that backend cannot run on this device here, with the reason.
    """
    device = _indexed(torch.device(device))
    source, name = _asked_for(setting)
    if name == "auto":
        return _automatic(device)
    reason = _load(name).unavailable(device)
    if reason:
        raise ConfigError(f'{source} = "{name}": {reason}')
    return name


def why_unavailable(name: str, device: torch.device | str = "cpu") -> str:
    """Returns why a backend of `BACKENDS` cannot run on a device here; "" if it can."""
    reason: str = _load(name).unavailable(torch.device(device))
    return reason


@contextlib.contextmanager
def using(setting: str) -> Iterator[None]:
    """Within it, ops that are called with `backend="auto"` use this setting."""
    token = _setting.set(setting)
    try:
        yield
    finally:
        _setting.reset(token)


def load_backend(setting: str, device: torch.device) -> ModuleType:
    """Returns the module of the backend that `choose_backend` gives."""
    return _load(choose_backend(setting, device))


def load_solver(setting: str, device: torch.device) -> ModuleType:
    """Returns the backend that solves Grams on a device: what a backend of another device leaves on the CPU is solved
    by the CPU's own."""
    _, name = _asked_for(setting)
    if device.type == "cpu" and name != "auto" and _load(name).unavailable(device):
        return _load(_automatic(device))
    return load_backend(setting, device)


def _asked_for(setting: str) -> tuple[str, str]:
    """Returns where the choice comes from, and a name that is known."""
    source, name = ENVIRONMENT, os.environ.get(ENVIRONMENT, "")
    if not name:
        source, name = "bucket_moo.backend", setting if setting != "auto" else _setting.get()
    known = ("auto", *BACKENDS)
    if name not in known:
        raise ConfigError(f'{source} = "{name}": unknown, expected {one_of(known)}{did_you_mean(name, known)}')
    return source, name


def _indexed(device: torch.device) -> torch.device:
    """Names the current one of several GPUs, which need not be alike."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _automatic(device: torch.device) -> str:
    skipped: list[str] = []
    for name in reversed(BACKENDS):
        if device.type not in (_load(name).DEVICES or (device.type,)):
            continue
        reason = _load(name).unavailable(device)
        if not reason:
            why = f" ({'; '.join(skipped)})" if skipped else ""
            idle = name == "reference" and device.type != "cpu"
            slow = ". IT IS MANY TIMES SLOWER than those, and the device waits for it" if idle else ""
            log = logger.warning if skipped else logger.info
            log("backend of the ops on %s: %s%s%s", device, name, why, slow)
            return name
        skipped.append(f"{name}: {reason}")
    raise AssertionError("the reference backend runs everywhere")


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{backends.__name__}.{name}")


def _discover() -> tuple[str, ...]:
    """The files of the folder that say on which devices they are chosen; the one that is tried last stands first."""
    names = [module.name for module in pkgutil.iter_modules(backends.__path__)]
    found = [name for name in names if f"{backends.__name__}.{name}" != __name__ and hasattr(_load(name), "DEVICES")]
    return tuple(sorted(found, key=lambda name: (_load(name).PRIORITY, name)))


BACKENDS = _discover()
