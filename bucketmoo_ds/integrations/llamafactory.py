"""LLaMA-Factory, started as a module of ours; its version 0 has no plugins.

    torchrun --nproc-per-node 2 -m bucketmoo_ds.integrations.llamafactory train.yaml

instead of `llamafactory-cli train train.yaml`, which refuses the YAML: it does not know the section

    bucket_moo:
      languages: [de, fr]

The language is that of a data set, `"language": "de"` in its entry of `dataset_info.json`, or of a row, in a column.

Read in LLaMA-Factory 0.9.5 (`launcher.py`, `train/tuner.py`, `data/loader.py`, `data/parser.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from bucketmoo_ds.config import SECTION
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.integrations.language_batches import prepared_apart
from bucketmoo_ds.integrations.language_trainer import LanguageTrainerMixin
from bucketmoo_ds.integrations.tool_settings import ToolSettings

_STAGES = {"pt": "CustomTrainer", "sft": "CustomSeq2SeqTrainer"}  # and the trainer that each builds
_REFUSED = {
    "streaming": "the rows of each language have to be counted",
    "use_hyper_parallel": "it has a trainer of its own",
    "use_asft_loss": "how its loss is divided is not known",
}
_REFUSED_PLACED = {
    "disable_shuffling": 'micro-batches of one language are drawn in another order; take mode: "mixed"',
}
_ELSEWHERE = {
    "USE_V1": "version 1 has trainers of its own",
    "USE_RAY": "Ray starts other processes, which would average",
    "USE_MCA": "Megatron has a trainer of its own",
}


def main() -> None:
    """What LLaMA-Factory does with its command line, and the section.

    Raises:
        ConfigError: something in it cannot be done.
        BucketMOOError: LLaMA-Factory has built another trainer.
    """
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    arguments = read_args()
    if not isinstance(arguments, dict):
        raise ConfigError(f"expected a YAML or JSON file that has a section {SECTION}")
    settings = ToolSettings(arguments.pop(SECTION, None))
    if not settings.config.enabled:
        run_exp(arguments)
        return
    _refuse(arguments, settings)
    built: list[Any] = []
    with _preparing_apart(settings), _training(settings, arguments["stage"], built.append):
        run_exp(arguments)
    if not built:
        raise BucketMOOError("LLaMA-Factory has built no trainer of bucketmoo_ds: what it has trained has averaged")


def _refuse(arguments: dict[str, Any], settings: ToolSettings) -> None:
    if arguments.get("stage") not in _STAGES:
        raise ConfigError(f"stage: {arguments.get('stage')}: expected one of {', '.join(_STAGES)}")
    refused = _REFUSED | (_REFUSED_PLACED if settings.config.mode != "mixed" else {})
    for name, why in refused.items():
        if arguments.get(name):
            raise ConfigError(f"{name}: {why}")
    for name, why in _ELSEWHERE.items():
        if os.environ.get(name, "").lower() in ("true", "y", "1"):
            raise ConfigError(f"{name} of the environment: {why}; leave it out")


@contextlib.contextmanager
def _training(settings: ToolSettings, stage: str, tell: Callable[[Any], None]) -> Iterator[None]:
    """Trainers that are made inside the `with` block are ours."""
    workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
    behind: Any = getattr(workflow, _STAGES[stage])

    class Trainer(LanguageTrainerMixin, behind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **settings.trainer_arguments, **kwargs)
            tell(self)

    with _replaced(workflow, _STAGES[stage], Trainer):
        yield


@contextlib.contextmanager
def _preparing_apart(settings: ToolSettings) -> Iterator[None]:
    """Data that are prepared inside the `with` block have the column."""
    from llamafactory.data import loader, parser

    join, align, preprocess = parser.DatasetAttr.join, loader.align_dataset, loader._get_preprocessed_dataset

    def joined(entry: Any, told: dict[str, Any]) -> None:
        join(entry, told)
        entry.language = told.get("language")

    def aligned(rows: Any, entry: Any, *rest: Any) -> Any:
        return prepared_apart(
            rows,
            settings.column,
            lambda part: align(part, entry, *rest),
            language=getattr(entry, "language", None),
            name=entry.dataset_name,
        )

    def preprocessed(rows: Any, *rest: Any, **more: Any) -> Any:
        if rows is None:
            return None
        return prepared_apart(rows, settings.column, lambda part: preprocess(part, *rest, **more))

    with (
        _replaced(parser.DatasetAttr, "join", joined),
        _replaced(loader, "align_dataset", aligned),
        _replaced(loader, "_get_preprocessed_dataset", preprocessed),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


if __name__ == "__main__":
    main()
