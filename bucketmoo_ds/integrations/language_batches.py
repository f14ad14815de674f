"""The batches of `LanguageTrainerMixin`: micro-batches of one language, and rows that keep theirs while they are
prepared and packed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bucketmoo_ds.adapters import table
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.sampler import LanguageBatchSampler
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.integrations.language_column import LanguageColumn
from bucketmoo_ds.plan.choices import ranks_per_node

_OF_TOKENS = "bucketmoo_languages"  # while a row is packed


def placed_loader(
    trainer: Any, config: BucketMOOConfig, languages: NDArray[np.integer], options: Mapping[str, Any]
) -> Any:
    """Returns Trainer's loader, with all its arguments, over micro-batches of one language.

    Args:
        trainer, config: whose.
        languages: the index of each row's language.
        options: of the `LanguageBatchSampler`.

    Raises:
        ConfigError: the arguments ask for another order of the rows, or see `LanguageBatchSampler`.
    """
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import seed_worker

    args, dataset, collator = trainer.args, trainer.train_dataset, trainer.data_collator
    order = getattr(args, "train_sampling_strategy", "random")
    if order != "random" or getattr(args, "group_by_length", False):  # the latter is transformers 4's
        raise ConfigError(
            f'train_sampling_strategy = "{order if order != "random" else "group_by_length"}": LanguageBatchSampler '
            'draws micro-batches of one language at random; leave it out, or take mode="mixed"'
        )
    sampler = LanguageBatchSampler(
        dataset,
        config,
        sample_languages=languages,
        micro_batch_size=trainer._train_batch_size,
        micro_steps=args.gradient_accumulation_steps,
        world_size=args.world_size,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        **{"affinity": _affinity(trainer, config), **options},
    )
    trainer._moo_placed = sampler
    if hasattr(dataset, "remove_columns"):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    kept = ("num_workers", "pin_memory", "persistent_workers", "multiprocessing_context", "prefetch_factor", "in_order")
    told = {name: getattr(args, f"dataloader_{name}") for name in kept if hasattr(args, f"dataloader_{name}")}
    init = functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, worker_init_fn=init, **told)
    return trainer.accelerator.prepare(loader)


def _affinity(trainer: Any, config: BucketMOOConfig) -> str:
    """The sampler's: what is exchanged once a window is exchanged in one piece where each rank keeps a language for the
    window; unless the window would then hold fewer languages than it can."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    once = plugin is not None and table.find("deepspeed", plugin.zero_stage).exchanged == table.ONCE_A_WINDOW
    ranks = trainer.args.world_size
    places = ranks // ranks_per_node(config, ranks) if config.exchange == "two_stage" else ranks
    return "window" if once and places >= len(config.languages) else "micro_step"


def prepared_apart(
    rows: Any, column: LanguageColumn, prepare: Callable[[Any], Any], *, language: str | None = None, name: str = ""
) -> Any:
    """Prepares (tokenizes, splits, packs) the rows of each language by themselves, and gives what comes of them the
    column: whatever a tool drops, or makes of a row, the language is known.

    Args:
        rows: a `datasets.Dataset`.
        column: says the language of a row.
        prepare: the tool's; from rows to rows.
        language: that of all rows; left out, their column says it.
        name: of the data, for errors.

    Raises:
        ConfigError: neither says a row's language.
        LanguageError: what is said is none of the languages.
    """
    from datasets import concatenate_datasets

    if language is not None:
        parts = [(column.index(language), rows)]
    elif column.name in rows.column_names:
        of_rows = column.of_rows(rows)
        parts = [(each, rows.select((of_rows == each).nonzero()[0])) for each in sorted(set(of_rows.tolist()))]
    else:
        raise ConfigError(
            f'the data set {name} has no column "{column.name}" (it has {", ".join(rows.column_names)}), and its entry '
            f"does not say `language:`: say the language of all its rows there, or of each in a column, "
            f"{SECTION}.language_column"
        )
    told = []
    for index, part in parts:
        prepared = prepare(part)
        if column.name in prepared.column_names:
            prepared = prepared.remove_columns(column.name)
        told.append(prepared.add_column(column.name, [column.names[index]] * len(prepared)))
    return concatenate_datasets(told)


def packed_apart(dataset: Any, column: LanguageColumn, prepare: Callable[..., Any], args: Any, rest: Any) -> Any:
    """Packs the rows of each language by themselves."""
    return prepared_apart(dataset, column, lambda part: _prepared(prepare, part, args, rest))


def packed_together(dataset: Any, column: LanguageColumn, prepare: Callable[..., Any], args: Any, rest: Any) -> Any:
    """Packs rows as they come, with the language of every token."""
    from trl import pack_dataset

    if args.max_length is None:
        raise ValueError("When packing is enabled, `max_length` can't be `None`.")
    whole = copy.copy(args)
    whole.max_length, whole.shuffle_dataset = None, False
    index, name = column.reader(dataset), column.name
    dataset = _prepared(prepare, dataset, whole, (False, *rest[1:]))

    def of_tokens(row: Mapping[str, Any]) -> dict[str, list[int]]:
        told, count = row[name], len(row["input_ids"])
        return {_OF_TOKENS: [index(each) for each in told] if isinstance(told, list) else [index(told)] * count}

    # A column of another name: under its own it would stay a ClassLabel, whose numbers these are no more.
    dataset = dataset.map(of_tokens, remove_columns=[name]).rename_column(_OF_TOKENS, name)
    dataset = dataset.select_columns(["input_ids", "labels", name])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _prepared(prepare: Callable[..., Any], dataset: Any, args: Any, rest: Any) -> Any:
    packing, formatting_func, dataset_name = rest
    return prepare(dataset, args=args, packing=packing, formatting_func=formatting_func, dataset_name=dataset_name)
