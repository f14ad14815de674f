"""`MixedTrainerMixin`: transformers' Trainer and TRL's SFTTrainer with their own samplers, collators and packing, where
the only thing that a user adds is the language of a row.

    class Trainer(bm.MixedTrainerMixin, SFTTrainer): ...

    trainer = Trainer(model=..., train_dataset=..., moo=bm.BucketMOOConfig(languages=["de", "fr"]))

Read in transformers 5.23 (`trainer.py`) and TRL 1.16 (`sft_trainer.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters import mixed
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.integrations.fused_head import unfuse
from bucketmoo_ds.pipeline import checkpoint

_OF_TOKENS = "bucketmoo_languages"  # while a row is packed


class MixedTrainerMixin:
    """To be put before a Trainer class. It keeps the language of every row through preparing, packing and collating,
    registers the model (`bucketmoo_ds.mixed.register`), tells each window's tokens, and keeps its state in checkpoints.

    Args:
        moo: the settings; without them the trainer is exactly the class behind.
        language_column: the column of the training data that says a row's language, by name, index or ClassLabel; or,
            where rows are packed already, a list with the language of each token, -1 for none.

    Under DeepSpeed the settings become its JSON's section, with `"mode": "mixed"`, and DeepSpeed's own checkpoints hold
    the state.

    Raises:
        ConfigError: there is no such column, or see `mixed.register`.
    """

    def __init__(
        self, *args: Any, moo: BucketMOOConfig | None = None, language_column: str = "language", **kwargs: Any
    ) -> None:
        self._moo_config = moo
        self._moo: mixed.MixedSession | None = None
        self._language_column = language_column
        super().__init__(*args, **kwargs)
        if moo is None:
            return
        trainer: Any = self
        _check_column(trainer.train_dataset, language_column)
        trainer.data_collator = LanguageCollator(
            trainer.data_collator, moo, language_column, _classes(trainer.train_dataset, language_column)
        )
        unfuse(trainer.model)
        if trainer.is_deepspeed_enabled:
            section = {**moo.to_json(), "mode": "mixed"}
            trainer.accelerator.state.deepspeed_plugin.deepspeed_config[SECTION] = section
            return
        self._moo = mixed.register(trainer.model, moo, micro_steps=lambda: _divided_by(trainer))
        trainer.add_callback(_state_keeper(self._moo))

    @property
    def moo(self) -> mixed.MixedSession | None:
        """The session; `None` without settings, and, under DeepSpeed, before there is an engine."""
        engine = getattr(self, "model_wrapped", None) if self._moo_config is not None else None
        return self._moo or getattr(engine, "moo", None)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        trainer: Any = self
        if self._moo_config is not None and self._language_column not in trainer._signature_columns:
            trainer._signature_columns = [*trainer._signature_columns, self._language_column]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        """TRL's: packing keeps two columns alone, so here it is done with the language of every token beside them."""
        prepare: Callable[..., Any] = super()._prepare_dataset  # type: ignore[misc]
        column = self._language_column
        if self._moo_config is None or not packing or column not in (dataset.column_names or [column]):
            return prepare(dataset, processing_class, args, packing, *rest)
        from trl import pack_dataset

        if args.max_length is None:
            raise ValueError("When packing is enabled, `max_length` can't be `None`.")
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        index = _index(LanguageTable(self._moo_config.languages), _classes(dataset, column))
        dataset = prepare(dataset, processing_class, whole, False, *rest)

        def of_tokens(row: Mapping[str, Any]) -> dict[str, list[int]]:
            count = len(row["input_ids"])
            told = row[column]
            return {_OF_TOKENS: [index(each) for each in told] if isinstance(told, list) else [index(told)] * count}

        # A column of another name: under its own it would stay a ClassLabel, whose numbers these are no more.
        dataset = dataset.map(of_tokens, remove_columns=[column]).rename_column(_OF_TOKENS, column)
        dataset = dataset.select_columns(["input_ids", "labels", column])
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; it fetches all micro-batches of a window, which the session is told."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.moo is not None and batches:
            self.moo.expect(batches)
        return batches, num_items

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        if self._moo is not None and resume_from_checkpoint:
            trainer: Any = self
            if resume_from_checkpoint is True:
                from transformers.trainer_utils import get_last_checkpoint

                resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir) or True
            if resume_from_checkpoint is not True:
                states = checkpoint.load(Path(resume_from_checkpoint), self._moo.config)
                if states is not None:
                    self._moo.load_state_dict(states["moo"])
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]


class LanguageCollator:
    """A collator that puts the languages of its rows beside what another one makes of them; rows without any, as
    evaluation may have them, go to the other as they are.

    Args:
        collator: the other; it does not see the column.
        config: the settings.
        column: the column of the rows.
        classes: the names of its ClassLabel, if it is one.

    Raises:
        LanguageError: a row is of none of the languages.
    """

    def __init__(
        self, collator: Callable[..., Any], config: BucketMOOConfig, column: str, classes: Sequence[str] | None
    ) -> None:
        self._collator = collator
        self._key = config.language_key
        self._column = column
        self._index = _index(LanguageTable(config.languages), classes)

    def __call__(self, features: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """Returns the micro-batch with one more entry: `[batch]`, or `[batch, sequence]` where rows say it by token or
        are laid one after the other."""
        if not any(self._column in feature for feature in features):
            return self._collator(features, *args, **kwargs)
        told = [feature[self._column] for feature in features]
        rest = [{name: each for name, each in feature.items() if name != self._column} for feature in features]
        lengths = [len(feature["input_ids"]) for feature in features]
        batch = self._collator(rest, *args, **kwargs)
        by_row = [[self._index(each) for each in row] if _is_list(row) else [self._index(row)] for row in told]
        shape = batch["input_ids"].shape
        flattened = shape[0] == 1 and len(features) > 1
        if not flattened and not any(_is_list(row) for row in told):
            batch[self._key] = torch.tensor([row[0] for row in by_row])
            return batch
        pairs = zip(by_row, lengths, strict=True)
        tokens = [torch.tensor(row * length if len(row) == 1 else row) for row, length in pairs]
        batch[self._key] = _laid_out([torch.cat(tokens)] if flattened else tokens, shape, batch.get("attention_mask"))
        return batch


def _laid_out(tokens: Sequence[Tensor], shape: torch.Size, attention_mask: Tensor | None) -> Tensor:
    """The languages `[batch, sequence]` of rows of tokens, padded on the side where the tokens are; -1 elsewhere."""
    languages = torch.full(tuple(shape), -1)
    for row, each in enumerate(tokens):
        left = attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[row, 0])
        start = shape[1] - len(each) if left else 0
        languages[row, start : start + len(each)] = each
    return languages


def _is_list(told: object) -> bool:
    return isinstance(told, (list, tuple)) or getattr(told, "ndim", 0) > 0


def _index(table: LanguageTable, classes: Sequence[str] | None) -> Callable[[Any], int]:
    """Returns the index of a language as the column writes it; -1, for none, stays."""

    def index(value: Any) -> int:
        if isinstance(value, int) and value == -1:
            return -1
        if classes is not None and isinstance(value, int):
            if not 0 <= value < len(classes):
                raise LanguageError(f"{value} is no number of the column's ClassLabel {list(classes)}")
            return table.index(classes[value])
        return table.index(value)

    return index


def _classes(dataset: Any, column: str) -> Sequence[str] | None:
    """The names of a ClassLabel, of rows or of their tokens."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def _check_column(dataset: Any, column: str) -> None:
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise ConfigError(
            f'the training data has no column "{column}" (it has {", ".join(names)}): add one that says the language '
            "of each row, or name it, language_column=..."
        )


def _divided_by(trainer: Any) -> int:
    """By how many micro-steps Trainer divides a loss that is the mean of a micro-batch."""
    return int(getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps))


def _state_keeper(session: mixed.MixedSession) -> Any:
    from transformers import TrainerCallback

    class StateKeeper(TrainerCallback):
        """Writes the session's state into each checkpoint."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            states = {"moo": session.state_dict()}
            checkpoint.save(folder, session.config, session.plan, states, session.exchange)

    return StateKeeper()
