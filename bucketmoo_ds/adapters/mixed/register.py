"""`register`: languages may mix in every micro-batch, under any wrapper, whose collectives stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from bucketmoo_ds.adapters.mixed import coverage
from bucketmoo_ds.adapters.mixed.session import MixedSession, check_mode
from bucketmoo_ds.comm.exchange import Exchange, control_group
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError


def register(
    model: nn.Module,
    config: BucketMOOConfig,
    *,
    micro_steps: int | Callable[[], int] = 1,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    loss_scale: Callable[[], float] = lambda: 1.0,
) -> MixedSession:
    """Resolves the conflicts of a model's languages in micro-batches that mix them.

    The batch says which language each of its sequences or tokens is of (`config.language_key`): `[batch]` names or
    indices, or `[batch, sequence]` indices with -1 for none. Everything else of a training loop stays: the wrapper, the
    reduction, accumulation, clipping, the optimizer. What arrives in `.grad` is the combined gradient.

    The weights come from earlier windows: every `gram_every` windows, 8 by default, Grams are taken in backward, each
    rank of its own tokens, and what crosses the wire is K x K numbers a block. The first window averages.

    Args:
        model: plain, or wrapped in DDP or by `fully_shard`; FullyShardedDataParallel is put around it afterwards.
        config: the settings; `mode` is "mixed" or "auto".
        micro_steps: M, what the training loop divides a loss that is a mean by: backward passes between two optimizer
            steps. A window ends with the step, however many came.
        reduction: how the wrapper adds up the ranks' gradients: `mean`, as all of them do by themselves, or `sum`.
        group: the data-parallel ranks; all by default.
        loss_scale: tells what losses are multiplied by, such as `scaler.get_scale`. Gradients keep the factor; Grams,
            whose mean runs over many windows, are divided by its square.

    Returns:
        The session: `session.last` is the latest window's resolution.

    Raises:
        ConfigError: a trained parameter belongs to a module whose rows might not be independent, or a setting or
            argument that cannot be.
        DisagreementError: on every rank, if their settings or models differ.
    """
    check_mode(config)
    if not callable(micro_steps) and (isinstance(micro_steps, bool) or micro_steps < 1):
        raise ConfigError(f"micro_steps = {micro_steps!r}: expected a whole number, 1 or more")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f'reduction = {reduction!r}: expected "mean" or "sum"')
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError(
            "mixed.register: the model is wrapped in FullyShardedDataParallel, which hides its parameters; register "
            "the model first, and wrap it then"
        )
    inner = model.module if isinstance(model, DistributedDataParallel) else model  # one name, before and after wrapping
    covered = coverage.of_model(inner)
    together = dist.is_available() and dist.is_initialized()
    exchange = Exchange(group, control_group(group)) if together else Exchange()
    device = next(each.device for each in model.parameters() if each.requires_grad)
    told = micro_steps if callable(micro_steps) else (lambda: micro_steps)
    divisor = float(exchange.world_size) if reduction == "mean" else 1.0
    return MixedSession(model, covered, config, exchange, told, divisor, device, loss_scale)
