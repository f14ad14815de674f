"""axolotl's plugin. What a YAML says of several languages:

    plugins:
      - bucketmoo_ds.integrations.axolotl.BucketMOOPlugin
    trainer_cls: bucketmoo_ds.integrations.axolotl.Trainer
    bucket_moo:
      languages: [de, fr]
    datasets:
      - path: de.jsonl
        type: completion
        language: de        # or each row in a column

axolotl only logs a plugin that it cannot import, drops the keys that no schema knows, and trains on; but it stops where
it cannot import `trainer_cls`. So the plugin insists on it.

Read in axolotl 0.19 (`integrations/base.py`, `utils/data/sft.py`, `core/builders/causal.py`, `core/trainers/base.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from pydantic import BaseModel

from bucketmoo_ds.config import SECTION
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.integrations.language_batches import prepared_apart
from bucketmoo_ds.integrations.language_column import LanguageCollator
from bucketmoo_ds.integrations.language_trainer import LanguageTrainerMixin
from bucketmoo_ds.integrations.tool_settings import ToolSettings

TRAINER = "bucketmoo_ds.integrations.axolotl.Trainer"

_REFUSED = {
    "rl": "preferences and rewards have trainers of their own; it is for causal language models",
    "reward_model": "it is for causal language models",
    "process_reward_model": "it is for causal language models",
    "streaming": "the rows of each language have to be counted",
    "pretraining_dataset": "it streams, and the rows of each language have to be counted; name it under datasets",
    "batch_flattening": "rows laid one after the other have not been tried; leave it out",
    "orpo_alpha": "its loss is not the mean over target tokens",
    "sample_packing": "a pack would mix languages; leave it out",
}
_REFUSED_PLACED = {
    "curriculum_sampling": 'micro-batches of one language are drawn in another order; take mode: "mixed"',
}


class BucketMOOArguments(BaseModel):
    """The key that axolotl's schema gets."""

    bucket_moo: dict[str, Any] | None = None


class Trainer(LanguageTrainerMixin, AxolotlTrainer):
    """axolotl's trainer of causal language models, with the section of the YAML."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cfg = PluginManager.get_instance().cfg
        super().__init__(*args, **_settings(cfg or {}).trainer_arguments, **kwargs)

    @contextlib.contextmanager
    def _moo_collating(self, dataset: Any) -> Iterator[None]:
        """Loaders of evaluation have a collator of their own here."""
        trainer: Any = self
        own = trainer.eval_data_collator
        with super()._moo_collating(dataset):
            trainer.eval_data_collator = LanguageCollator(own, self._moo_column, dataset)
            try:
                yield
            finally:
                trainer.eval_data_collator = own


class BucketMOOPlugin(BasePlugin):
    """Reads the section, and keeps the language of every row through axolotl's preparation of data."""

    def register(self, cfg: Any) -> None:
        """Looks at the YAML as it is written.

        Raises:
            ConfigError: something in it cannot be done, or would be lost.
        """
        config = _settings(cfg).config
        if cfg.get("trainer_cls") != TRAINER:
            raise ConfigError(
                f"trainer_cls: expected {TRAINER}: where a plugin cannot be imported, axolotl logs it and trains on "
                "without it; where trainer_cls cannot, it stops"
            )
        refused = _REFUSED | (_REFUSED_PLACED if config.mode != "mixed" else {})
        for key, why in refused.items():
            if config.enabled and cfg.get(key):
                raise ConfigError(f"{key}: {why}")
        for key in ("context_parallel_size", "tensor_parallel_size"):
            if config.enabled and (cfg.get(key) or 1) > 1:
                raise ConfigError(f"{key}: each rank has to see whole rows of its own; expected 1")
        # axolotl's schema drops what it does not know of an entry.
        self._languages = {
            key: [entry.get("language") for entry in cfg.get(key) or ()] for key in ("datasets", "test_datasets")
        }

    def get_input_args(self) -> str:
        """See `BasePlugin`."""
        return f"{__name__}.{BucketMOOArguments.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """axolotl's own, with the language of every row.

        Raises:
            ConfigError: it is not known.
        """
        from axolotl.common import datasets

        settings = _settings(cfg)
        if not settings.config.enabled:
            return None
        for key, languages in self._languages.items():
            for entry, language in zip(cfg.get(key) or (), languages, strict=True):
                entry["language"] = language
        # axolotl finds what it has prepared by a hash that knows nothing of languages.
        told = json.dumps([settings.column.name, settings.column.names, self._languages])
        folder = f"{SECTION}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        above = cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH
        cfg["dataset_prepared_path"] = str(Path(above) / folder)
        with _preparing_apart(settings):
            return datasets.load_datasets(cfg=cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """See `BasePlugin`.

        Raises:
            BucketMOOError: another plugin has taken the trainer.
        """
        if _settings(cfg).config.enabled and not isinstance(trainer, Trainer):
            raise BucketMOOError(
                f"axolotl has built {type(trainer).__name__}, which would average the languages: another plugin "
                f"brings a trainer, and goes before trainer_cls: {TRAINER}; leave that one out"
            )


def _settings(cfg: Any) -> ToolSettings:
    section = cfg.get(SECTION)
    return ToolSettings(section.to_dict() if hasattr(section, "to_dict") else section)


@contextlib.contextmanager
def _preparing_apart(settings: ToolSettings) -> Iterator[None]:
    """Data that are prepared inside the `with` block have the column."""
    from axolotl.utils.data import sft

    together = sft.get_dataset_wrapper

    def apart(*, dataset_config: Any, dataset: Any, **rest: Any) -> tuple[Any, Any]:
        prompters = []

        def prepare(rows: Any) -> Any:
            prepared, prompter = together(dataset_config=dataset_config, dataset=rows, **rest)
            prompters.append(prompter)
            return prepared

        language, path = dataset_config.get("language"), dataset_config.get("path")
        return prepared_apart(dataset, settings.column, prepare, language=language, name=path), prompters[0]

    sft.get_dataset_wrapper = apart
    try:
        yield
    finally:
        sft.get_dataset_wrapper = together
