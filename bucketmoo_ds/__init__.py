"""Bucket-level multi-objective optimization (MOO) of multilingual gradients inside DeepSpeed's gradient reduction.

Importing this package teaches DeepSpeed, where it is installed, the `bucket_moo` section of its JSON; nothing changes
for engines whose JSON has no such section.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bucketmoo_ds.patches import when_imported

if TYPE_CHECKING:
    from bucketmoo_ds.adapters.deepspeed import initialize
    from bucketmoo_ds.adapters.probe import probe_dependencies
    from bucketmoo_ds.aggregate import weights
    from bucketmoo_ds.config import BucketMOOConfig
    from bucketmoo_ds.data.sampler import LanguageBatchSampler
    from bucketmoo_ds.data.schedule import LanguageSchedule
    from bucketmoo_ds.integrations.language_trainer import LanguageTrainerMixin
    from bucketmoo_ds.integrations.prepare import prepare
    from bucketmoo_ds.integrations.trainer import Trainer

__version__ = "0.1.0"

_PUBLIC = {
    "BucketMOOConfig": "bucketmoo_ds.config",
    "LanguageBatchSampler": "bucketmoo_ds.data.sampler",
    "LanguageSchedule": "bucketmoo_ds.data.schedule",
    "LanguageTrainerMixin": "bucketmoo_ds.integrations.language_trainer",
    "Trainer": "bucketmoo_ds.integrations.trainer",
    "prepare": "bucketmoo_ds.integrations.prepare",
    "probe_dependencies": "bucketmoo_ds.adapters.probe",
    "weights": "bucketmoo_ds.aggregate",
}

__all__ = [
    "BucketMOOConfig",
    "LanguageBatchSampler",
    "LanguageSchedule",
    "LanguageTrainerMixin",
    "Trainer",
    "__version__",
    "initialize",
    "prepare",
    "probe_dependencies",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "mixed":  # of no framework
        return importlib.import_module("bucketmoo_ds.adapters.mixed")
    for framework in importlib.import_module("bucketmoo_ds.adapters.table").FRAMEWORKS:
        first, _, rest = framework.public.partition(".")
        if name == first:
            return framework.load() if rest else getattr(framework.load(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _install(deepspeed: ModuleType) -> None:
    """DeepSpeed takes seconds to import: it is wrapped when somebody imports it, before or after this package."""
    importlib.import_module("bucketmoo_ds.adapters.deepspeed")


def _listen(trainer: ModuleType) -> None:
    """Trainer knows how it divides its losses; see the module."""
    importlib.import_module("bucketmoo_ds.integrations.trainer_loss").install(trainer)


def _reach_through(data_loader: ModuleType) -> None:
    """Accelerate's loaders hand the epoch on to our sampler."""
    importlib.import_module("bucketmoo_ds.integrations.accelerate").install(data_loader)


when_imported("deepspeed", _install)
when_imported("transformers.trainer", _listen)
when_imported("accelerate.data_loader", _reach_through)
