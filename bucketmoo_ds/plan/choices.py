"""What settings come to in a run: the aggregator, the nodes, the exchange, streaming or not; or why they cannot be."""

from __future__ import annotations

import os

import torch.distributed as dist

from bucketmoo_ds import aggregate
from bucketmoo_ds.comm.exchange import Exchange, control_group
from bucketmoo_ds.config import BY_LOSS, SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.plan.blocks import BlockPlan


def create_aggregator(config: BucketMOOConfig) -> aggregate.Aggregator:
    """Returns the aggregator that the settings name.

    Raises:
        ConfigError: an unknown name or option, or an option out of range.
    """
    try:
        aggregate.find(config.aggregator)
    except ConfigError as error:
        raise ConfigError(f"{SECTION}.{error}") from error
    try:
        rule = aggregate.create(config.aggregator, **config.aggregator_options)
        rule.at(config.languages, range(len(config.languages)), ())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{SECTION}.aggregator_options: {error}") from error
    if config.aggregator == "static" and config.preferred(()) is not None:
        raise ConfigError(
            f'{SECTION}.preference: means what the shares of the aggregator "static" do; give one of the two (with '
            '"aggregator": "mean", preference is a weighted average too)'
        )
    return rule


def needs_losses(config: BucketMOOConfig) -> bool:
    """Returns whether a window has to know each language's loss."""
    return config.normalize in BY_LOSS or aggregate.find(config.aggregator).uses_losses


def named(config: BucketMOOConfig) -> str:
    """Returns the languages as the log names them, with their preference where there is one."""
    preferred = config.preferred(range(len(config.languages)))
    if preferred is None:
        return ", ".join(config.languages)
    each = zip(config.languages, preferred, strict=True)
    return ", ".join(f"{name} x {number:g}" for name, number in each)


def choose_gram_every(config: BucketMOOConfig, automatic: int) -> int:
    """Returns the windows from one Gram to the next; `automatic` is what `auto` comes to in this mode."""
    return automatic if isinstance(config.gram_every, str) else config.gram_every


def ranks_per_node(config: BucketMOOConfig, world_size: int) -> int:
    """Returns how many consecutive ranks of the data-parallel group share a node.

    Raises:
        ConfigError: `two_stage` was asked for where there are no several nodes of several ranks each, or
            `ranks_per_node` leaves a node that is not full.
    """
    per_node = min(config.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or world_size, world_size)
    if config.ranks_per_node and world_size % per_node:
        raise ConfigError(
            f"{SECTION}.ranks_per_node = {per_node}: {world_size} ranks are not whole nodes of so many; set it to the "
            "ranks of a node, or leave it out"
        )
    fits = world_size % per_node == 0 and 1 < per_node < world_size
    if config.exchange == "two_stage" and not fits:
        raise ConfigError(
            f'{SECTION}.exchange = "two_stage": {world_size} ranks with {per_node} a node are not several nodes of '
            f'several ranks each; set {SECTION}.ranks_per_node, or use "auto"'
        )
    return per_node if world_size % per_node == 0 else 1


def create_exchange(config: BucketMOOConfig, group: dist.ProcessGroup | None) -> Exchange:
    """Returns the exchange of a data-parallel group; a collective call, as `Exchange` says.

    Raises:
        ConfigError: see `ranks_per_node`.
    """
    return Exchange(group, control_group(group), ranks_per_node(config, dist.get_world_size(group)))


def choose_streaming(config: BucketMOOConfig, plan: BlockPlan, exchanges: int) -> bool:
    """Returns whether buckets are resolved as they arrive: with one exchange a window and no block across buckets, and
    unless `streaming` is asked for, by a rule that is solved while the next bucket is exchanged.

    Raises:
        ConfigError: `streaming` was asked for where it cannot be.
    """
    obstacle = ""
    if exchanges > 1:
        obstacle = f"a window has {exchanges} exchanges (gradient_accumulation_steps)"
    elif plan.spans_buckets:
        obstacle = f'blocks of granularity "{config.granularity}" span several buckets'
    if config.mode == "streaming":
        if obstacle:
            raise ConfigError(f'{SECTION}.mode = "streaming": {obstacle}; use "auto" or "deferred"')
        return True
    few = len(config.languages) <= create_aggregator(config).streams_up_to
    return config.mode == "auto" and not obstacle and few
