"""The sampler: which rows of a dataset each micro-batch holds, one language a micro-batch.

`LanguageSchedule` decides the languages of a window's slots, this file fills them with rows:

    sampler = LanguageBatchSampler(dataset, config, micro_batch_size=4, micro_steps=8, world_size=2)
    loader = DataLoader(dataset, batch_sampler=sampler)

**Whose batches.** Without a `rank` the sampler yields the *global order*: window by window, micro-step by micro-step,
the batch of rank 0, of rank 1, ... Accelerate, and so Trainer, gives rank r the batches r, r + W, r + 2W, ... of it. It
comes in whole cycles of W full batches, so that nothing is refilled or evened out. With `rank=r`, for a loop of one's
own, it yields that rank's batches only; never hand such a sampler to Accelerate, which would divide it once more.

**Position.** `iter(sampler)` begins at the window set last by `seek`, `set_epoch` or `load_state_dict`, and an
iteration that runs to its end moves on to the beginning of the next epoch. A DataLoader with workers draws batches
before they are trained on, so the one who counts optimizer steps knows the position, not the sampler:

    sampler.seek(*divmod(optimizer_steps, sampler.windows_per_epoch))      # resume
    state = sampler.state_dict(epoch=epoch, window=window)                 # or kept in a checkpoint of one's own

A position lies between windows: a half-trained window leaves no gradients behind, so it is trained again.

**What is said.** When the first batch is drawn, rank 0 logs how many windows of an epoch hold one language only, and
warns where they are many: such a window has no conflict to resolve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, Sampler

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data import switched_on
from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.data.schedule import LanguageSchedule, Repeat
from bucketmoo_ds.errors import ConfigError, did_you_mean
from bucketmoo_ds.logs import logger, show_by_default
from bucketmoo_ds.plan.choices import ranks_per_node as ranks_of_a_node

# The share of an epoch's windows that may hold one language only before it is a warning: the end of an epoch of a dozen
# windows is none.
QUIET = 0.1


class LanguageBatchSampler(Sampler[list[int]]):
    """Yields the row numbers of one micro-batch after the other, each of one language.

    Args:
        dataset: a map-style dataset with a language column: a Hugging Face `Dataset`, or anything with `len` whose
            rows are mappings. The column holds names, indices into `languages`, or a `ClassLabel` in the order of
            `languages`. Not needed where `sample_languages` is given.
        config: gives `languages`, `language_column`, `seed` and `ranks_per_node` where those are not given.
        languages: the K names, in the order of their indices.
        language_column: the column's name, `language` if nothing says otherwise.
        sample_languages: the language of each row, by name or index, instead of the dataset's column.
        micro_batch_size: samples of a micro-batch.
        micro_steps: M, the micro-batches of a rank between two optimizer steps (gradient accumulation steps).
        world_size: W, the number of ranks; that of `torch.distributed` where it is initialised, else 1.
        rank: yields this rank's micro-batches only; `None` yields the global order, see the module.
        temperature, affinity, epoch_end, repeat: see `LanguageSchedule`.
        seed: of everything random, alike on all ranks; 0 if nothing says otherwise.
        ranks_per_node: L, ranks that train on one language in a micro-step, see `LanguageSchedule`. Where the config
            says `exchange: two_stage`, its nodes if nothing says otherwise; else 1.

    Attributes:
        schedule: the `LanguageSchedule`: `schedule.table(epoch, window)` has the language index of each slot.
        rank: that of the micro-batches, `None` for the global order.
        batch_size, drop_last: what Accelerate reads of a batch sampler.

    Raises:
        ConfigError: a `ValueError` that names the setting and its value.
    """

    drop_last = True

    def __init__(
        self,
        dataset: Any = None,
        config: BucketMOOConfig | None = None,
        *,
        micro_batch_size: int,
        micro_steps: int = 1,
        world_size: int | None = None,
        rank: int | None = None,
        languages: Sequence[str] | None = None,
        language_column: str | None = None,
        sample_languages: Sequence[str | int] | NDArray[np.integer] | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        affinity: str = "micro_step",
        epoch_end: str = "longest",
        repeat: Repeat = 1,
        ranks_per_node: int | None = None,
    ) -> None:
        if languages is None:
            if config is None:
                raise ConfigError('languages: missing; give the list of languages, such as ["de", "fr"], or a config')
            languages = config.languages
        names = list(languages)
        column = language_column or (config.language_key if config is not None else "language")
        self._labels = _labels(dataset, column, sample_languages, names)
        self._rows = [np.flatnonzero(self._labels == index) for index in range(len(names))]
        if world_size is None:
            world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks_per_node is None:
            ranks_per_node = 1
            if config is not None and config.exchange == "two_stage":
                ranks_per_node = ranks_of_a_node(config, world_size)
        self.schedule = LanguageSchedule(
            names,
            [len(rows) for rows in self._rows],
            world_size=world_size,
            micro_steps=micro_steps,
            micro_batch_size=micro_batch_size,
            temperature=temperature,
            seed=seed if seed is not None else config.seed if config is not None else 0,
            affinity=affinity,
            epoch_end=epoch_end,
            repeat=repeat,
            ranks_per_node=ranks_per_node,
            adapt=config.schedule if config is not None and config.enabled else None,
        )
        if rank is not None and not 0 <= rank < world_size:
            raise ConfigError(f"rank = {rank}: expected 0 to {world_size - 1}, as world_size = {world_size}")
        self.rank = rank
        self.batch_size = micro_batch_size
        self._start = (0, 0)
        self._drawn = (0, 0)
        self._shuffled: dict[int, tuple[tuple[int, int], NDArray[np.int64]]] = {}
        self._averages = config is not None and not config.enabled
        self._said = False

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self._start
        if not self._said:
            self._said = True
            self._say()
        for window in range(start, self.windows_per_epoch):
            *batches, last = self._window_batches(epoch, window)
            yield from batches
            self._drawn = self._position(epoch, window + 1)
            yield last
        self.seek(epoch + 1)

    def __len__(self) -> int:
        """The micro-batches of a whole epoch, wherever the next iteration begins."""
        return self.windows_per_epoch * self._batches_per_window

    @property
    def languages(self) -> tuple[str, ...]:
        """The K names, in the order of their indices."""
        return self.schedule.languages

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration begins in."""
        return self._start[0]

    @property
    def window(self) -> int:
        """The window of it that the next iteration begins with."""
        return self._start[1]

    @property
    def windows_per_epoch(self) -> int:
        """The windows, that is the optimizer steps, of an epoch; equal for all epochs."""
        return self.schedule.windows_per_epoch

    @property
    def tail(self) -> dict[str, int]:
        """The samples of each language that an epoch leaves out; other samples in each epoch."""
        return self.schedule.tail

    def language_of(self, epoch: int, batch_index: int) -> int:
        """Returns the language index of the epoch's batch `batch_index`, counted as this sampler yields them.

        So a batch has its label even where a collator drops the column. In the global order, micro-step s (counted
        over the epoch) of rank r is batch `s * W + r`.
        """
        window, place = divmod(batch_index, self._batches_per_window)
        table = self.schedule.table(epoch, window)
        return int(table.flat[place] if self.rank is None else table[place, self.rank])

    def seek(self, epoch: int, window: int = 0) -> None:
        """Sets where the next iteration begins; one window past the last is the beginning of the next epoch.

        Raises:
            ConfigError: a negative number, or a window beyond the epoch.
        """
        self._start = self._drawn = self._position(epoch, window)

    def follow(self, run: Any) -> None:
        """Lets a run move how often languages are sampled, where `config.schedule` says so. The run's own checkpoints
        then hold what it has moved; one that was loaded before counts.

        Args:
            run: the session, DeepSpeed engine or pipeline that the batches are for.

        Raises:
            ConfigError: this sampler, or the run, was made without `schedule.adapt`.
        """
        moo = getattr(run, "moo", run)
        mixture = self.schedule.mixture
        if mixture is None and not moo.config.schedule:
            return
        if mixture is None or self.schedule.adapt != moo.config.schedule:
            raise ConfigError(
                f"bucket_moo.schedule = {moo.config.schedule}, but the sampler was made with {self.schedule.adapt}: "
                "give it the same config"
            )
        moo.steering.follow(mixture)

    def set_epoch(self, epoch: int) -> None:
        """Moves to the beginning of an epoch. A position that `seek` set within this same epoch is kept, since trainers
        call `set_epoch` after resuming."""
        if epoch != self._start[0]:
            self.seek(epoch)

    def state_dict(self, *, epoch: int | None = None, window: int | None = None) -> dict[str, Any]:
        """Returns a position and what it is a position in, as JSON values.

        Args:
            epoch, window: how many epochs, and windows of the present one, have been trained on. Without them, those
                of which all batches have been drawn: right only where nothing draws batches ahead of training.

        Raises:
            ConfigError: one of the two without the other.
        """
        if (epoch is None) != (window is None):
            raise ConfigError(f"state_dict(epoch={epoch}, window={window}): expected both or neither")
        if epoch is not None and window is not None:
            epoch, window = self._position(epoch, window)
        else:
            epoch, window = self._drawn
        return {
            "epoch": epoch,
            "window": window,
            "fingerprint": self.fingerprint(),
            "settings": self.schedule.settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`.

        Raises:
            ConfigError: the state belongs to other data or settings, where its position means something else.
        """
        if state["fingerprint"] != self.fingerprint():
            ours, theirs = self.schedule.settings(), state["settings"]
            different = [f"{name} = {ours[name]!r} (saved: {theirs.get(name)!r})" for name in ours]
            different = [text for name, text in zip(ours, different, strict=True) if ours[name] != theirs.get(name)]
            raise ConfigError(
                "the saved position belongs to another schedule: "
                f"{'; '.join(different) or 'the languages of the rows, or the version of NumPy, differ'}. Resume with "
                f"the saved settings, or begin the next epoch with seek({state['epoch'] + 1})"
            )
        self.seek(state["epoch"], state["window"])

    def fingerprint(self) -> str:
        """Returns 32 hexadecimal digits that are equal on all ranks, and in a resumed run, where the rows' languages
        and the schedule are."""
        digest = hashlib.blake2b(self.schedule.fingerprint().encode(), digest_size=16)
        digest.update(self._labels.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def _batches_per_window(self) -> int:
        return self.schedule.micro_steps * (self.schedule.world_size if self.rank is None else 1)

    def _position(self, epoch: int, window: int) -> tuple[int, int]:
        if epoch < 0 or not 0 <= window <= self.windows_per_epoch:
            raise ConfigError(
                f"epoch = {epoch}, window = {window}: expected an epoch of 0 or more and a window from 0 to "
                f"{self.windows_per_epoch}"
            )
        return (epoch, window) if window < self.windows_per_epoch else (epoch + 1, 0)

    def _window_batches(self, epoch: int, window: int) -> Iterator[list[int]]:
        """Yields the rows of this sampler's micro-batches of a window; a language's batches go to its slots in turn."""
        taken = self.schedule.taken(window, epoch).tolist()
        for languages in self.schedule.table(epoch, window).tolist():
            for rank, language in enumerate(languages):
                if self.rank in (None, rank):
                    yield self._batch(epoch, language, taken[language])
                taken[language] += 1

    def _batch(self, epoch: int, language: int, taken: int) -> list[int]:
        """Returns the rows of a language's micro-batch number `taken` of an epoch."""
        round, place = self.schedule.place_in_round(language, taken)
        if self._shuffled.get(language, (None,))[0] != (epoch, round):
            order = self._rows[language][self.schedule.sample_order(epoch, language, round)]
            self._shuffled[language] = ((epoch, round), order)
        _, order = self._shuffled[language]
        rows: list[int] = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        return rows

    def _say(self) -> None:
        """Tells, once, what an epoch is, and expects that somebody resolves its conflicts."""
        if len(self.languages) == 1 or self._averages:
            return
        switched_on.expect()
        rank = dist.get_rank() if self.rank is None and dist.is_available() and dist.is_initialized() else self.rank
        if rank:
            return
        schedule = self.schedule
        alone, windows = schedule.windows_of_one_language, schedule.windows_per_epoch
        text = f"sampler: {alone} of {windows} windows of an epoch ({alone / windows:.1%}) hold one language only"
        again = [f"{name} {rounds:.1f} times" for name, rounds in schedule.rounds.items() if rounds > 1]
        if again:
            text += f"; come round again: {', '.join(again)}"
        if schedule.adapt is not None:
            text += f"; shares move ({schedule.adapt['adapt']})"
        show_by_default()
        if alone <= QUIET * windows:
            logger.info(text)
        else:
            logger.warning(f"{text}; they have no conflict to resolve: {self._remedy()}")

    def _remedy(self) -> str:
        """Names the settings that put more languages into a window."""
        schedule = self.schedule
        if schedule.places == 1:
            now = ", ".join(
                f"{name} = {getattr(schedule, name)}"
                for name in ("micro_steps", "world_size", "ranks_per_node", "affinity")
            )
            return f'a window has one place ({now}); raise micro_steps, with affinity = "micro_step"'
        settings = []
        if schedule.repeat != "auto":
            settings.append('repeat = "auto", so that small languages come round again while the others last')
        if schedule.epoch_end == "longest":
            settings.append('epoch_end = "shortest", to end an epoch with the first language that runs out')
        if schedule.temperature > 1:
            settings.append("a lower temperature")
        return "set " + ", or ".join(settings)


def _labels(dataset: Any, column: str, given: Any, languages: Sequence[str]) -> NDArray[np.int32]:
    """Returns the language index of every row, `[rows]`."""
    table = LanguageTable(languages)
    if given is None:
        return _column_labels(dataset, column, table)
    if hasattr(dataset, "__len__") and len(dataset) != len(given):
        raise ConfigError(f"sample_languages has {len(given)} entries; expected {len(dataset)}, one for each row")
    return table.column(*_distinct(given.tolist() if hasattr(given, "tolist") else given), "sample_languages")


def _column_labels(dataset: Any, column: str, table: LanguageTable) -> NDArray[np.int32]:
    values, codes = distinct_values(dataset, column)
    names = values
    for each in class_names(dataset, column):
        table.check_classes(each, [value for value in values if isinstance(value, int)], column)
        if _is_hugging_face(dataset):
            known = dict(enumerate(each))
            names = [known.get(value) if isinstance(value, int) else value for value in values]
    return table.column(names, codes, f'column "{column}"')


def distinct_values(dataset: Any, column: str) -> tuple[list[Any], NDArray[np.int64]]:
    """Returns the distinct values of a column, as it writes them, and for each row which of them it has.

    Raises:
        ConfigError: there is no such column, or rows cannot be picked by number.
    """
    if dataset is None:
        raise ConfigError("dataset: missing; give a dataset with a language column, or sample_languages")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigError(
            f"dataset = {type(dataset).__name__}: rows of an iterable dataset cannot be picked by number, so no rank "
            "could say which language comes next; expected a map-style dataset. Load it without streaming=True, or "
            "save it once: datasets.Dataset.from_generator(lambda: iter(stream))"
        )
    if _is_hugging_face(dataset):
        return _hugging_face_values(dataset, column)
    values = []
    for row in range(len(dataset)):
        sample = dataset[row]
        if not isinstance(sample, Mapping) or column not in sample:
            raise _missing_column(column, list(sample) if isinstance(sample, Mapping) else [])
        values.append(sample[column])
    return _distinct(values)


def _is_hugging_face(dataset: Any) -> bool:
    return hasattr(dataset, "column_names") and hasattr(dataset, "with_format")


def _hugging_face_values(dataset: Any, column: str) -> tuple[list[Any], NDArray[np.int64]]:
    """Reads the column as Arrow does, so that ten million strings become numbers without a Python object each."""
    if column not in dataset.column_names:
        raise _missing_column(column, dataset.column_names)
    arrow = dataset.select_columns([column]).with_format("arrow")[:]
    if arrow.schema.field(column).type.num_fields:
        kind = dataset.features[column]
        raise ConfigError(f'column "{column}" holds {kind}: expected a name, an index or a ClassLabel in each row')
    encoded = arrow.column(column).combine_chunks().dictionary_encode()
    values: list[Any] = encoded.dictionary.to_pylist()
    return [*values, None], encoded.indices.fill_null(len(values)).to_numpy().astype(np.int64)


def class_names(dataset: Any, column: str) -> list[Sequence[str]]:
    """Returns the names of the column's `ClassLabel`, where it is one. Torch's `Subset` and `ConcatDataset` hide the
    features of what they are made of, but not the numbers."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    if feature is not None:
        return [feature.names] if hasattr(feature, "names") else []
    inner = [*getattr(dataset, "datasets", []), getattr(dataset, "dataset", None)]
    return [names for each in inner if each is not None for names in class_names(each, column)]


def _distinct(values: Sequence[Any]) -> tuple[list[object], NDArray[np.int64]]:
    """Returns the distinct values in order of appearance, and for each row which of them it has."""
    codes: dict[tuple[type, object], int] = {}
    plain = (value.item() if hasattr(value, "item") else value for value in values)
    rows = [codes.setdefault((type(value), value), len(codes)) for value in plain]
    return [value for _, value in codes], np.array(rows, dtype=np.int64)


def _missing_column(column: str, known: Sequence[str]) -> ConfigError:
    return ConfigError(
        f'language_column = "{column}": the dataset has no such column{did_you_mean(column, known)} (it has: '
        f"{', '.join(map(str, known)) or 'none, its rows are no mappings'}); name the column, or give sample_languages"
    )
