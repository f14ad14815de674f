"""Granularity: the static plan of buckets, blocks and segments.

A *bucket* is the span of gradient that is reduced in one go, a *block* is the unit on which a conflict is resolved,
and a *segment* is a contiguous run of one rank's shard of a bucket that belongs to one block. Grams add up: the Gram
of a union of segments is the sum of theirs. So every granularity is only another way to number blocks.

A new granularity is one function with `@granularity("name")`, here or in any module that is imported before the plan
is made.

The plan depends on nothing but the names, sizes and order of the trainable parameters and on the bucket size: it is
the same in every step, on every rank and stage, whatever order autograd delivers gradients in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of
from bucketmoo_ds.plan import refined


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A trainable parameter: its name in the model and its number of elements."""

    name: str
    numel: int


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A run of consecutive parameters, flattened one after the other in the model's order.

    Args:
        parameters: indices into `BlockPlan.parameters`, ascending.
        offsets: where each of them starts in the bucket, in elements.
        numel: elements of the bucket, without padding.
    """

    name: str
    parameters: tuple[int, ...]
    offsets: tuple[int, ...]
    numel: int


class Run(NamedTuple):
    """Consecutive elements of one parameter: its index in the plan, where they start, and how many they are."""

    parameter: int
    start: int
    numel: int


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of one shard of a bucket.

    Args:
        spans: `[n, 2]` int64, the start of each segment in the shard and its length, in elements.
        cells: `[n]` int64, the cell of each segment (see `BlockPlan`), counted from the bucket's first.
        num_cells: cells of the bucket; some may have no segment in this shard.
    """

    spans: Tensor
    cells: Tensor
    num_cells: int


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Which parameter lies in which bucket and block.

    A *cell* is the part of a block that lies in one bucket. Grams are taken for each cell, so that a row that is not
    finite can be traced to its bucket, and added up to blocks afterwards.

    Args:
        parameters: the trainable parameters in the model's order.
        buckets: in the order in which they are reduced: from the model's last parameter to its first, as backward
            delivers them.
        blocks: the names of the blocks.
        block_of: the block of each parameter.
        granularity: how blocks were numbered.
        cell_block: the block of each cell.
        cell_bucket: the bucket of each cell; the cells of a bucket are consecutive.
        left_out: of each block the languages that do not use it, and are no objectives there; empty where every
            language counts on every block, as with all granularities but `refined`.
    """

    parameters: tuple[Parameter, ...]
    buckets: tuple[Bucket, ...]
    blocks: tuple[str, ...]
    block_of: tuple[int, ...]
    granularity: str
    cell_block: tuple[int, ...]
    cell_bucket: tuple[int, ...]
    left_out: tuple[tuple[int, ...], ...] = ()

    def counting(self, languages: int) -> Tensor | None:
        """Returns `[B, K]` bool, the languages that count on each block; `None` where all do everywhere."""
        if not any(self.left_out):
            return None
        mask = torch.ones(len(self.blocks), languages, dtype=torch.bool)
        for block, unused in enumerate(self.left_out):
            mask[block, list(unused)] = False
        return mask

    @property
    def spans_buckets(self) -> bool:
        """Whether some block lies in more than one bucket, so that it cannot be resolved while streaming."""
        return len(self.cell_block) > len(set(self.cell_block))

    def cells_of(self, bucket: int) -> tuple[int, ...]:
        """Returns the numbers of the cells of a bucket."""
        return tuple(cell for cell, of in enumerate(self.cell_bucket) if of == bucket)

    def segments(self, bucket: int, start: int, stop: int) -> Segments:
        """Returns the segments of the shard `[start, stop)` of a bucket; padding beyond the bucket has none."""
        members = self.buckets[bucket]
        places = zip(members.parameters, members.offsets, strict=True)
        runs = [Run(index, offset, self.parameters[index].numel) for index, offset in places]
        return self.segments_of(bucket, runs, start, stop)

    def segments_of(self, bucket: int, runs: Sequence[Run], start: int, stop: int) -> Segments:
        """Returns the segments of the slice `[start, stop)` of something that holds these runs of a bucket's
        parameters, in ascending order."""
        cells = self.cells_of(bucket)
        number = {self.cell_block[cell]: cell - cells[0] for cell in cells}
        spans: list[list[int]] = []
        owners: list[int] = []
        for run in runs:
            begin = max(run.start, start)
            end = min(run.start + run.numel, stop)
            if begin >= end:
                continue
            cell = number[self.block_of[run.parameter]]
            if spans and owners[-1] == cell and sum(spans[-1]) == begin - start:
                spans[-1][1] += end - begin
            else:
                spans.append([begin - start, end - begin])
                owners.append(cell)
        return Segments(
            spans=torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
            cells=torch.tensor(owners, dtype=torch.int64),
            num_cells=len(cells),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values, for logs and checkpoints."""
        return {
            "granularity": self.granularity,
            "buckets": [
                {"name": bucket.name, "numel": bucket.numel, "parameters": len(bucket.parameters)}
                for bucket in self.buckets
            ],
            "blocks": list(self.blocks),
        }

    def fingerprint(self) -> str:
        """Returns a hash of everything in the plan: equal plans have equal fingerprints on every machine."""
        fields = dataclasses.asdict(self)
        if not self.left_out:  # only with one granularity: the fingerprints of all others stay
            del fields["left_out"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def plan_blocks(parameters: Sequence[Parameter], bucket_size: int, granularity: str | refined.Refined) -> BlockPlan:
    """Plans buckets and blocks.

    Buckets are filled greedily from the last parameter to the first until the next one would exceed `bucket_size`; a
    larger parameter has a bucket of its own. Inside a bucket the parameters keep the model's order.

    Args:
        parameters: the trainable parameters in the model's order, tied ones once.
        bucket_size: elements a bucket may hold (DeepSpeed's `reduce_bucket_size`).
        granularity: see `plan_buckets`.

    Raises:
        ConfigError: no trainable parameter, or a bucket size below 1.
    """
    if bucket_size < 1:
        raise ConfigError(f"zero_optimization.reduce_bucket_size = {bucket_size}: expected at least 1 element")
    return plan_buckets(parameters, _filled(parameters, bucket_size), granularity)


def plan_buckets(
    parameters: Sequence[Parameter], members: Sequence[Sequence[int]], granularity: str | refined.Refined
) -> BlockPlan:
    """Plans blocks over given buckets.

    Args:
        parameters: the trainable parameters in the model's order, tied ones once.
        members: for each bucket, in the order in which they are reduced, the indices of its parameters, ascending.
        granularity: a name of `GRANULARITIES`, or what `granularity_of` returns. Blocks are numbered in the model's
            order.

    Raises:
        ConfigError: no trainable parameter, an unknown granularity, or patterns that do not go with the parameters.
    """
    if not parameters:
        raise ConfigError("the model has no trainable parameter: nothing to resolve")
    name = granularity.base if isinstance(granularity, refined.Refined) else granularity
    label = label_of(name)
    buckets = [_bucket(number, parameters, indices) for number, indices in enumerate(members)]
    bucket_of = {index: bucket.name for bucket in buckets for index in bucket.parameters}
    labels = [label(parameter.name, bucket_of[index]) for index, parameter in enumerate(parameters)]
    unused: dict[str, tuple[int, ...]] = {}
    if isinstance(granularity, refined.Refined):
        name = refined.NAME
        labels, unused = granularity.blocks([parameter.name for parameter in parameters], labels)
    blocks = list(dict.fromkeys(labels))
    number_of = {text: number for number, text in enumerate(blocks)}
    block_of = [number_of[text] for text in labels]
    cells = [
        (block, number)
        for number, bucket in enumerate(buckets)
        for block in sorted({block_of[index] for index in bucket.parameters})
    ]
    return BlockPlan(
        parameters=tuple(parameters),
        buckets=tuple(buckets),
        blocks=tuple(blocks),
        block_of=tuple(block_of),
        granularity=name,
        cell_block=tuple(block for block, _ in cells),
        cell_bucket=tuple(number for _, number in cells),
        left_out=tuple(unused[block] for block in blocks) if unused else (),
    )


# What compiling, activation checkpointing and FSDP1 put into the names of a module's parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Returns the name that a parameter has in the model without wrappers: blocks keep their names, and a run can be
    resumed, with them and without."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


Label = Callable[[str, str], str]

# By name, the function that says which block a parameter belongs to. A block is whatever it gives the same label.
GRANULARITIES: dict[str, Label] = {}


def granularity(name: str) -> Callable[[Label], Label]:
    """Returns the decorator that makes a function known as a granularity, before the model is registered.

    The function takes the names of a parameter and of its bucket and returns the name of its block. It must say the
    same on every rank.

    Raises:
        ValueError: the name is taken by another function.
    """

    def decorate(label: Label) -> Label:
        if name == refined.NAME:
            raise ValueError(f'granularity("{name}"): the name is that of a granularity with options; choose another')
        known = GRANULARITIES.setdefault(name, label)
        if (known.__module__, known.__qualname__) != (label.__module__, label.__qualname__):
            raise ValueError(f'granularity("{name}"): the name already belongs to {known.__qualname__}; choose another')
        GRANULARITIES[name] = label
        return label

    return decorate


def label_of(name: str) -> Label:
    """Returns the function of a granularity.

    Raises:
        ConfigError: an unknown name.
    """
    if name == refined.NAME:
        raise ConfigError(f'{SECTION}.granularity = "{name}": needs granularity_options; {refined.WAY_OUT}')
    if name not in GRANULARITIES:
        known = (*GRANULARITIES, refined.NAME)
        raise ConfigError(
            f'{SECTION}.granularity = "{name}": unknown, expected {one_of(known)}{did_you_mean(name, known)}'
        )
    return GRANULARITIES[name]


def granularity_of(config: BucketMOOConfig) -> str | refined.Refined:
    """Returns what the settings say of blocks, for `plan_buckets`.

    Raises:
        ConfigError: an unknown granularity, or options that it does not have or that are wrong.
    """
    if config.granularity == refined.NAME:
        found = refined.Refined.from_config(config)
        try:
            label_of(found.base)
        except ConfigError as error:
            raise ConfigError(f"{SECTION}.granularity_options.base: {error}") from error
        return found
    label_of(config.granularity)
    if config.granularity_options:
        raise ConfigError(
            f'{SECTION}.granularity_options: granularity "{config.granularity}" has none; they are those of "refined"'
        )
    return config.granularity


@granularity("bucket")
def bucket_block(parameter: str, bucket: str) -> str:
    """A block a bucket."""
    return bucket


@granularity("parameter")
def parameter_block(parameter: str, bucket: str) -> str:
    """A block a parameter."""
    return parameter


@granularity("layer")
def layer_block(parameter: str, bucket: str) -> str:
    """A block a repeated layer or, outside of one, a module: `model.layers.3.mlp.up.weight` -> `model.layers.3`,
    `model.norm.weight` -> `model.norm`."""
    parts = parameter.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return ".".join(parts[:-1]) or parameter


@granularity("model")
def model_block(parameter: str, bucket: str) -> str:
    """One block, which is classical full-gradient MOO."""
    return "model"


def _filled(parameters: Sequence[Parameter], bucket_size: int) -> list[list[int]]:
    groups: list[list[int]] = []
    filled = 0
    for index in reversed(range(len(parameters))):
        numel = parameters[index].numel
        if not groups or filled + numel > bucket_size:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += numel
    return [group[::-1] for group in groups]


def _bucket(number: int, parameters: Sequence[Parameter], members: Sequence[int]) -> Bucket:
    offsets = []
    numel = 0
    for index in members:
        offsets.append(numel)
        numel += parameters[index].numel
    first, last = parameters[members[0]].name, parameters[members[-1]].name
    span = first if first == last else f"{first} .. {last}"
    return Bucket(f"bucket {number} ({span})", tuple(members), tuple(offsets), numel)
