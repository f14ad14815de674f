"""What an aggregator is, and the registry that finds one by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of
from bucketmoo_ds.transfer import to_device

# What a rule keeps of blocks from window to window, by name: `[B]`, `[B, K]` or `[B, K, K]` float64.
State = dict[str, Tensor]


class Aggregator(ABC):
    """A rule from the Grams of blocks to the weights of their languages.

    A subclass is a frozen dataclass: its fields are its options, checked in `__post_init__`. It is registered with
    `@register("name")` and lives in a file of its own in this package, or anywhere that is imported before use.

    Attributes:
        streams_up_to: the most languages with which one block is solved within about a millisecond, measured on one
            thread. Where a run has no more, buckets are resolved one by one as they arrive (streaming); else all blocks
            of a window are solved in one call at its end. 0, the default: always so.
        uses_losses: whether its weights follow from the languages' losses, of which `with_losses` tells it.
    """

    streams_up_to: ClassVar[int] = 0
    uses_losses: ClassVar[bool] = False

    def at(self, languages: Sequence[str], present: Sequence[int], blocks: Sequence[int]) -> Aggregator:
        """Returns the rule for one call of `weights`; most rules are the same wherever they are used.

        Args:
            languages: the names of all languages.
            present: the indices, into `languages`, of the K rows.
            blocks: the numbers of the B blocks.

        Raises:
            ConfigError: options that do not go with these languages.
        """
        return self

    def with_losses(self, losses: Tensor, preference: Tensor) -> Aggregator:
        """Returns the rule for one call of `weights`, where it `uses_losses`.

        Args:
            losses: `[B, K]` float64, finite: the mean loss per target token of each language in the window.
            preference: `[B, K]` float64: what the rows of the Gram have been multiplied by for `preference`.
        """
        return self

    @abstractmethod
    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the weights of every block, all blocks at once.

        The built-in rules stay on the device of the Gram and never ask it a question: a fixed number of steps, and no
        `.item()`, `bool(tensor)`, boolean indexing or copy to the host. One that does works too, but on an accelerator
        each question waits for all that was queued before.

        A block's weights depend on nothing but the block: neither on the others of the call nor on their number.

        Args:
            gram: `[B, K, K]` float64, symmetric positive semidefinite up to rounding, finite, and 0 in the rows and
                columns of languages that the mask leaves out.
            mask: `[B, K]` bool, the languages that count; at least one a block.
            generator: the only source of randomness, in the same state on every rank.

        Returns:
            `[B, K]` float64, 0 where the mask is false. In the averaging convention: 1/K each is plain averaging.
        """


    def start(self, languages: int) -> State:
        """Returns what the rule keeps of a block before its first window: nothing, for most rules. See `Stateful`."""
        return {}

    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """Returns `weights`, and the new state of these blocks. See `Stateful`."""
        return self.weights(gram, mask, generator), {}


class Stateful(Aggregator):
    """A rule that keeps something of every block from one window to the next.

    The state is alike on all ranks and goes into the checkpoint. It changes when a window ends whose rows are finite;
    blocks without a choice (one language, a Gram that is not finite) keep theirs, and so do languages that the mask
    leaves out or that are absent from the window, and pairs with one of them.
    """

    @abstractmethod
    def start(self, languages: int) -> State:
        """Returns the state of one block before its first window: a tensor by name, each of whose dimensions counts
        languages: `[]`, `[K]` or `[K, K]` float64, finite."""

    @abstractmethod
    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """Returns the weights of every block, and the new state; it changes no tensor that it is given.

        Args:
            gram, mask, generator: see `weights`. Each window's Grams have a scale of their own.
            state: as `start`, with the blocks in front: `[B]`, `[B, K]` or `[B, K, K]`, of the K languages of the Gram.
        """

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`: those of a first window."""
        start = {
            name: to_device(each, torch.float64, gram.device).expand(len(gram), *each.shape)
            for name, each in self.start(gram.shape[-1]).items()
        }
        return self.step(gram, mask, start, generator)[0]


AggregatorClass = TypeVar("AggregatorClass", bound=type[Aggregator])

_REGISTRY: dict[str, type[Aggregator]] = {}
# What stands before the colon of a name, and what makes a class of the part behind it.
_FAMILIES: dict[str, Callable[[str], type[Aggregator]]] = {}


def register(name: str) -> Callable[[AggregatorClass], AggregatorClass]:
    """Returns the class decorator that makes an aggregator known under `name`.

    Raises:
        ValueError: the name is taken by another class, or the class is no dataclass derived from `Aggregator`.
    """

    def decorate(cls: AggregatorClass) -> AggregatorClass:
        if not (isinstance(cls, type) and issubclass(cls, Aggregator) and dataclasses.is_dataclass(cls)):
            raise ValueError(f'register("{name}"): expected a frozen dataclass derived from Aggregator, got {cls!r}')
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f'register("{name}"): the name already belongs to {known.__qualname__}; choose another')
        _REGISTRY[name] = cls
        return cls

    return decorate


def register_family(prefix: str, find_member: Callable[[str], type[Aggregator]]) -> None:
    """Makes the aggregators `prefix:NAME` known. `find_member` returns the class of a NAME, or raises ConfigError."""
    _FAMILIES[prefix] = find_member


def names() -> tuple[str, ...]:
    """Returns the names of all registered aggregators, sorted."""
    return tuple(sorted(_REGISTRY))


def find(name: str) -> type[Aggregator]:
    """Returns the class of the aggregator called `name`.

    Raises:
        ConfigError: (a ValueError) an unknown name.
    """
    known = (*names(), *(f"{prefix}:NAME" for prefix in _FAMILIES))
    if not isinstance(name, str):
        raise ConfigError(f"aggregator = {name!r}: expected a name, {one_of(known)}")
    prefix, colon, member = name.partition(":")
    if colon and prefix in _FAMILIES:
        return _FAMILIES[prefix](member)
    if name not in _REGISTRY:
        raise ConfigError(f'aggregator = "{name}": unknown, expected {one_of(known)}{did_you_mean(name, names())}')
    return _REGISTRY[name]


def create(name: str, **options: Any) -> Aggregator:
    """Returns the aggregator called `name` with these options.

    Raises:
        ConfigError: (a ValueError) an unknown name, an unknown option, or an option's value of a wrong type or range.
    """
    cls = find(name)
    fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    allowed = [field.name for field in fields]
    for option in options:
        if option not in allowed:
            expected = f"expected {one_of(allowed)}" if allowed else "it has no options"
            meant = did_you_mean(option, allowed)
            raise ConfigError(f'aggregator "{name}": unknown option "{option}", {expected}{meant}')
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in options:
            raise ConfigError(f'aggregator "{name}": option "{field.name}" is missing, and has no default')
    return cls(**options)


def check_number(aggregator: str, option: str, value: object, low: float, high: float) -> None:
    """Raises a ConfigError unless `value` is a number with `low <= value < high`; `True` is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        expected = f"expected a number from {low} to below {high}"
        raise ConfigError(f'aggregator "{aggregator}": {option} = {value!r}: {expected}')
