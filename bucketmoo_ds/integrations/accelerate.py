"""Accelerate's data loaders, also under Trainer, and `LanguageBatchSampler`: one epoch, and each batch to one rank.

`accelerator.prepare` and `skip_first_batches` put samplers of their own around ours, a `BatchSamplerShard` that deals
the batches out to the ranks and a `SkipBatchSampler`. Their `set_epoch` reaches through one of them and not through
both, so a run that is resumed inside its second epoch would be fed the rows of the first. Here it reaches ours through
any number of them, and batches that are to be skipped are not drawn: ours seeks. Loaders without our sampler are left
alone.

Read in Accelerate 1.15, `data_loader.py`, and transformers 5.23, `Trainer._run_epoch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.patches import wrap


def install(data_loader: ModuleType) -> None:
    """Wraps the loaders of `accelerate.data_loader`."""
    for loader in (data_loader.DataLoaderShard, data_loader.DataLoaderDispatcher):
        wrap(loader, "set_epoch", _set_epoch)
        wrap(loader, "__iter__", _iterate)
    wrap(data_loader.SkipBatchSampler, "__iter__", _seek)


def _set_epoch(wrapped: Any, loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wrapped(*args, **kwargs)
    *_, innermost = _samplers(loader)
    if _is_ours(innermost):
        innermost.set_epoch(loader.iteration)


def _iterate(wrapped: Any, loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The loader follows the sampler, which counts epochs and knows of `seek`. Its own count begins at 0 in a resumed
    run, and that of a loader which skipped batches is not handed back to the one it was made of."""
    *around, innermost = _samplers(loader)
    if _is_ours(innermost):
        _check(loader, around, innermost)
        loader.iteration = innermost.epoch
    return wrapped(*args, **kwargs)


def _seek(wrapped: Any, skipping: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Whole windows are skipped by ours, which need not draw them; each rank has `micro_steps` batches of one."""
    return _sought(wrapped, skipping)


def _sought(wrapped: Any, skipping: Any) -> Iterator[Any]:
    """Looks when the first batch is drawn: with workers, torch makes two iterators and draws from one."""
    *_, innermost = _inside(skipping)
    ours = _is_ours(innermost) and innermost.rank is None and innermost.window == 0
    windows, rest = divmod(skipping.skip_batches, innermost.schedule.micro_steps) if ours else (0, 1)
    undealt = skipping.batch_sampler is innermost
    if not ours or rest or (undealt and innermost.schedule.world_size > 1):
        yield from wrapped()
        return
    innermost.seek(innermost.epoch, windows)
    yield from skipping.batch_sampler


def _samplers(loader: Any) -> Iterator[Any]:
    """Yields the loader's batch sampler, the one inside it, and so on; `None` where it has none."""
    yield from _inside(loader.batch_sampler)


def _inside(sampler: Any) -> Iterator[Any]:
    yield sampler
    while (sampler := getattr(sampler, "batch_sampler", None)) is not None:
        yield sampler


def _is_ours(sampler: Any) -> bool:
    from bucketmoo_ds.data.sampler import LanguageBatchSampler

    return isinstance(sampler, LanguageBatchSampler)


def _check(loader: Any, around: list[Any], sampler: Any) -> None:
    """Stops where what Accelerate deals out to a rank is not what the schedule gives it.

    Raises:
        ConfigError: on every rank.
    """
    dealer = next((each for each in around if hasattr(each, "num_processes")), None)
    ranks = dealer.num_processes if dealer is not None else 1
    split = getattr(dealer, "split_batches", False)
    dispatches = dealer is None and hasattr(loader, "slice_fn") and not loader.submesh_tp
    if dispatches:  # the first rank reads for all
        ranks, split = loader.state.num_processes, loader.split_batches
    if ranks == 1:
        return
    if sampler.rank is not None:
        raise ConfigError(
            f"rank = {sampler.rank}: Accelerate deals the batches of a LanguageBatchSampler out to its {ranks} ranks, "
            "and would divide those of one rank once more; leave rank out"
        )
    if split and sampler.schedule.world_size > 1:
        raise ConfigError(
            f"split_batches = True: Accelerate gives each of {ranks} ranks a piece of every batch, so that a window "
            f"would hold other languages than the schedule of world_size = {sampler.schedule.world_size} says; leave "
            f"it off, or make the sampler with world_size=1 and a micro_batch_size that is {ranks} times as large"
        )
    if not split and sampler.schedule.world_size != ranks:
        raise ConfigError(
            f"world_size = {sampler.schedule.world_size}: Accelerate deals the batches out to {ranks} ranks; make the "
            f"LanguageBatchSampler with world_size={ranks}"
        )
    if dispatches and not split and any(getattr(each, "skip_batches", 0) for each in around):
        raise ConfigError(
            "dispatch_batches = True: to resume inside an epoch, Accelerate would skip as many batches of all ranks "
            "together as each has trained on; resume with dispatch_batches=False, which feeds the same rows"
        )
