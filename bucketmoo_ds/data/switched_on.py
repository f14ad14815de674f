"""Whether anything in this process resolves conflicts, so that a run that means to and averages is told.

What resolves them, a session of torch's wrappers or an engine, says so with `note`. `LanguageBatchSampler` calls
`expect` where it is iterated. The moment to judge is an optimizer's step: batches are drawn ahead of training, and
looked at before anything is registered, but a step that finds nobody resolving has averaged.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bucketmoo_ds.logs import logger, show_by_default


class _Watch:
    """What is known in this process.

    Attributes:
        owners: the sessions and engines that live.
        expecting: whether the next optimizer step is to be judged.
        hooked: whether steps are watched. The hook stays: torch goes through its hooks while one runs.
    """

    def __init__(self) -> None:
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self.expecting = False
        self.hooked = False


_watch = _Watch()


def note(owner: Any) -> None:
    """Says that this session or engine resolves conflicts, or was told not to, for as long as it lives."""
    _watch.owners.add(owner)


def any_alive() -> bool:
    """Returns whether any owner of `note` lives."""
    return len(_watch.owners) > 0


def expect() -> None:
    """Warns in the next optimizer step, on rank 0, if no owner lives then."""
    _watch.expecting = True
    if not _watch.hooked:
        register_optimizer_step_pre_hook(_judge)
        _watch.hooked = True


def _judge(optimizer: Optimizer, *_: Any) -> None:
    if not _watch.expecting:
        return
    _watch.expecting = False
    first = not (dist.is_available() and dist.is_initialized() and dist.get_rank())
    if first and not any_alive():
        show_by_default()
        logger.warning(
            "LanguageBatchSampler feeds a run that averages: %s steps, but no model is registered and no DeepSpeed "
            "engine has a bucket_moo section. Call bucketmoo_ds.ddp.register (or fsdp1, fsdp2, single) before "
            'training, or put "bucket_moo" into the DeepSpeed JSON and import bucketmoo_ds before '
            "deepspeed.initialize. If averaging is meant, give the sampler a config with enabled=False",
            type(optimizer).__name__,
        )
