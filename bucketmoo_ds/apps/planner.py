"""The planner: which exchange fits W ranks on nodes of L, which language each node trains on, and what a rank sends.

Arithmetic only. Exchange and schedule are chosen together: gradients can go by node (two stages) only where the L
ranks of a node train on one language in a micro-step, so that a window has L times fewer places for languages.

**What is counted.** Bytes that a rank sends in one window, averaged over the ranks, in all and between nodes. An
all-to-all sends each part straight to its rank. Reduce-scatters, all-gathers and all-reduces, those of plain frameworks
as well as ours, are counted as *rings in rank order*: a rank sends all it has to its right neighbour, so that one of
the L ranks of a node sends to another node. Libraries know other algorithms, which send as much in all. A gradient of P
elements is taken for one bucket of W equal slices; real buckets are padded each, by at most 8 W elements. The language
table and the hashes, some 100 bytes for each rank and micro-step, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bucketmoo_ds.adapters import table
from bucketmoo_ds.config import CHOICES
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

WIRE_BYTES = {"fp32": 4, "bf16": 2}
ROW_BYTES = {"float32": 4, "bfloat16": 2, "host": 4}
GRAM_BYTES = 8  # float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is forecast.

    Args:
        world_size: W, the ranks.
        ranks_per_node: L, consecutive ranks that share a fast connection.
        languages: K.
        parameters: P, the trainable elements of the model.
        micro_steps: M, between two optimizer steps.
        once_a_window: whether gradients are exchanged once a window, so that each rank adds up its micro-steps and
            keeps one language for the window (`once_a_window` of the `register` functions; ZeRO-0 and 1 always do).
        dtype: of gradients on the wire, `fp32` or `bf16`.
        framework: a name of `bucketmoo_ds.adapters.table`: what the plain run sends, and where combined gradients go.
        stage: 0 to 3, of DeepSpeed's ZeRO.
        replicas: R > 1: HSDP, R replicas of W/R consecutive ranks; FSDP2 only.
        buckets: how many the gradient is reduced in.
        blocks: how many it is resolved in, a block counting once for each bucket that it lies in; 0: one a bucket.
        exchange: `auto`, `flat` or `two_stage`, as in `BucketMOOConfig`.
        gram: `plain` or `cross`, as there: with the latter a language has two rows, of two halves of its micro-batches.

    Raises:
        ConfigError: a value out of range, or settings that do not fit together; the message names them.
    """

    world_size: int
    ranks_per_node: int
    languages: int
    parameters: int
    micro_steps: int = 1
    once_a_window: bool = False
    dtype: str = "fp32"
    framework: str = "fsdp2"
    stage: int | None = None
    replicas: int = 1
    buckets: int = 32
    blocks: int = 0
    exchange: str = "auto"
    gram: str = "plain"

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "blocks"):
            value, least = getattr(self, name), int(name in _COUNTS)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} = {value!r}: expected a whole number, {least} or more")
        known = {"dtype": tuple(WIRE_BYTES), "exchange": CHOICES["exchange"], "gram": CHOICES["gram"]}
        for name, names in known.items():
            value = getattr(self, name)
            if value not in names:
                hint = did_you_mean(str(value), names)
                raise ConfigError(f'{name} = "{value}": unknown, expected {one_of(names)}{hint}')
        for name in ("ranks_per_node", "replicas"):
            if self.world_size % getattr(self, name):
                raise ConfigError(
                    f"{name} = {getattr(self, name)}: world_size = {self.world_size} is no multiple of it"
                )
        self._check_framework()
        if self.exchange == "two_stage" and not self.several_nodes:
            raise ConfigError(
                f'exchange = "two_stage": {self.world_size} ranks with {self.ranks_per_node} a node are not several '
                'nodes of several ranks each; use "auto"'
            )

    def _check_framework(self) -> None:
        found = self.adapter
        if self.replicas > 1 and found.no_replicas:
            able = one_of(each.name for each in table.FRAMEWORKS if not each.no_replicas).removeprefix("one of ")
            raise ConfigError(f'replicas = {self.replicas}: not with "{found.name}", {found.no_replicas}; use {able}')
        if self.once_a_window and found.exchanged == table.EVERY_MICRO_STEP:
            raise ConfigError(
                f"once_a_window: on {found.title} gradients are exchanged in every micro-step; leave it out"
                + ", or use stage 1" * (self.stage is not None)
            )
        if self.world_size > 1 and not found.plain:
            raise ConfigError(f'world_size = {self.world_size}: framework = "{found.name}" is one process; use 1')

    @property
    def adapter(self) -> table.Framework:
        """What there is to know of the framework, and of its stage."""
        return table.find(self.framework, self.stage)

    @property
    def nodes(self) -> int:
        """n."""
        return self.world_size // self.ranks_per_node

    @property
    def several_nodes(self) -> bool:
        """Whether there are several nodes of several ranks each, so that gradients can go by node."""
        return 1 < self.ranks_per_node < self.world_size

    @property
    def exchanges(self) -> int:
        """How often gradients are exchanged in a window, and reduced without us; a place for a language counts once for
        each."""
        once = self.once_a_window or self.adapter.exchanged == table.ONCE_A_WINDOW
        return 1 if once else self.micro_steps

    def places(self, exchange: str) -> int:
        """Returns how many places for languages a window has: ranks, or nodes in two stages, in each exchange."""
        return self.exchanges * (self.nodes if exchange == "two_stage" else self.world_size)

    @property
    def rows(self) -> int:
        """Rows that all languages have."""
        return self.languages * (2 if self.gram == "cross" else 1)

    def rows_of_a_window(self, exchange: str) -> int:
        """Returns how many rows a window has at the most. Where a rank keeps its languages apart until the boundary, it
        has its micro-steps for their halves, too."""
        apart = self.adapter.exchanged == table.ONCE_A_WINDOW
        return min(self.rows, self.places(exchange) * (self.micro_steps if apart else 1))

    @property
    def shard(self) -> int:
        """Elements of a rank's slice of the gradient."""
        return -(-self.parameters // self.world_size)

    @property
    def piece(self) -> int:
        """Bytes of a rank's slice of the gradient on the wire."""
        return self.shard * WIRE_BYTES[self.dtype]


_COUNTS = ("world_size", "ranks_per_node", "languages", "parameters", "micro_steps", "replicas", "buckets")


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in one window: in all, and of these to other nodes."""

    total: int
    between_nodes: int

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.total + other.total, self.between_nodes + other.between_nodes)

    def __mul__(self, times: int) -> Sent:
        return Sent(self.total * times, self.between_nodes * times)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a rank sends in one window.

    Args:
        gradients: those of the micro-steps, to the ranks that resolve them (in a plain run: that average them).
        combined: the combined gradient, to the ranks that need it. With ZeRO-1/2 it is the most that can be, in all
            and between nodes: it depends on how DeepSpeed's partitions lie.
        grams: the partial Grams.
    """

    gradients: Sent
    combined: Sent = Sent(0, 0)
    grams: Sent = Sent(0, 0)

    @property
    def sum(self) -> Sent:
        """All of it."""
        return self.gradients + self.combined + self.grams


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a rank's rows."""

    device: int
    host: int = 0


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What `forecast` found.

    Args:
        setup: what for.
        exchange: `flat` or `two_stage`.
        reason: why.
        plain: what the framework sends without bucket MOO.
        flat: with the flat exchange and a language a rank.
        two_stage: with the exchange in two stages and a language a node; `None` where gradients cannot go by node.
        memory: of the rows, by `row_storage`, and `streaming`, where one exchange a window makes that possible.
        warnings: what it costs, with the way out.
    """

    setup: Setup
    exchange: str
    reason: str
    plain: Traffic
    flat: Traffic
    two_stage: Traffic | None
    memory: dict[str, Memory]
    warnings: tuple[str, ...]

    @property
    def languages_of_a_window(self) -> int:
        """The languages that a window covers."""
        return min(self.setup.languages, self.setup.places(self.exchange))

    def layout(self, window: int = 0) -> tuple[tuple[int, ...], ...]:
        """Returns which language each node, or each rank where the exchange is flat, trains on in each micro-step of a
        window: `[M, n]` or `[M, W]`. Where a window cannot cover all languages, they take turns.

        This is the pattern. `LanguageSchedule` fits the shares to the languages' sizes and draws the places anew for
        every window.
        """
        places, exchanges = self.setup.places(self.exchange), self.setup.exchanges
        order = [(window * places + place) % self.setup.languages for place in range(places)]
        width = places // exchanges
        rows = [tuple(order[first : first + width]) for first in range(0, places, width)]
        return tuple(rows * (self.setup.micro_steps // exchanges))

    def to_json(self) -> dict[str, Any]:
        """Returns all of it, with the layout of its first window, as plain JSON values."""
        return dataclasses.asdict(self) | {
            "languages_of_a_window": self.languages_of_a_window,
            "layout": [list(row) for row in self.layout()],
            "warnings": list(self.warnings),
        }


def forecast(setup: Setup) -> Forecast:
    """Chooses the exchange and the layout of languages, and counts what they cost.

    `exchange: auto` takes two stages where every language finds a place in a window though a place is a whole node, and
    else the flat exchange: which languages meet comes before the bytes.
    """
    exchange, reason = _choose(setup)
    return Forecast(
        setup=setup,
        exchange=exchange,
        reason=reason,
        plain=Traffic(_plain(setup) * setup.exchanges),
        flat=_ours(setup, "flat", _all_to_all(setup)),
        two_stage=_ours(setup, "two_stage", _two_stage(setup)) if setup.several_nodes else None,
        memory=_memory(setup, setup.rows_of_a_window(exchange)),
        warnings=tuple(_warnings(setup, exchange)),
    )


def _choose(setup: Setup) -> tuple[str, str]:
    if setup.exchange != "auto":
        return setup.exchange, "asked for"
    if not setup.several_nodes:
        return "flat", "all ranks are on one node" if setup.nodes == 1 else "every rank is a node of its own"
    places = setup.places("two_stage")
    has = f"a window has {_count(places, 'place')} of a whole node for {_count(setup.languages, 'language')}"
    return ("two_stage", has) if places >= setup.languages else ("flat", f"{has}, too few")


def _plain(setup: Setup) -> Sent:
    """What the framework sends in one reduction."""
    everyone = [range(setup.world_size)]
    if not setup.adapter.plain:
        return Sent(0, 0)
    if setup.adapter.plain == "all-reduce":
        return _ring(setup, everyone, setup.piece) * 2
    shards = setup.world_size // setup.replicas
    replicas = [range(first, first + shards) for first in range(0, setup.world_size, shards)]
    reduce_scatter = _ring(setup, replicas, setup.replicas * setup.piece)
    return reduce_scatter + _ring(setup, _same_shard(setup), setup.piece) * 2


def _all_to_all(setup: Setup) -> Sent:
    elsewhere = setup.world_size - setup.ranks_per_node
    return Sent((setup.world_size - 1) * setup.piece, elsewhere * setup.piece)


def _two_stage(setup: Setup) -> Sent:
    """A reduce-scatter inside a node, in L parts of n pieces, then an all-to-all of n pieces."""
    across = (setup.nodes - 1) * setup.piece
    return Sent((setup.ranks_per_node - 1) * setup.nodes * setup.piece + across, across)


def _ours(setup: Setup, exchange: str, gradients: Sent) -> Traffic:
    languages = min(setup.languages, setup.places(exchange))
    rows = setup.rows_of_a_window(exchange) if setup.gram == "cross" else languages
    return Traffic(gradients * setup.exchanges, _combined(setup), _grams(setup, rows, languages))


def _combined(setup: Setup) -> Sent:
    if setup.adapter.combined == "all-gather":
        return _ring(setup, [range(setup.world_size)], setup.piece)
    if setup.adapter.combined == "owners":
        return Sent(setup.piece if setup.world_size > 1 else 0, setup.piece if setup.nodes > 1 else 0)
    if setup.adapter.combined == "replicas":
        # They gather it in float32, whatever was on the wire. One replica has nothing to gather.
        return _ring(setup, _same_shard(setup), setup.shard * 4)
    return Sent(0, 0)


def _grams(setup: Setup, rows: int, languages: int) -> Sent:
    """While streaming all ranks are told all Grams. Deferred, each rank is told those of its blocks, and tells them,
    summed, with the weights."""
    blocks, everyone = setup.blocks or setup.buckets, [range(setup.world_size)]
    if setup.exchanges == 1:
        return _ring(setup, everyone, blocks * rows**2 * GRAM_BYTES)
    a_rank = -(-blocks // setup.world_size) * GRAM_BYTES
    elsewhere = setup.world_size - setup.ranks_per_node
    told = Sent((setup.world_size - 1) * a_rank * rows**2, elsewhere * a_rank * rows**2)
    return told + _ring(setup, everyone, a_rank * languages * (languages + 1))


def _ring(setup: Setup, groups: Sequence[Sequence[int]], piece: int) -> Sent:
    """A reduce-scatter or all-gather in each of the groups: every rank sends g - 1 pieces to its right neighbour."""
    hops = [hop for group in groups for hop in zip(group, (*group[1:], group[0]), strict=True)]
    across = sum(rank // setup.ranks_per_node != right // setup.ranks_per_node for rank, right in hops)
    total = (len(groups[0]) - 1) * piece
    return Sent(total, round(total * across / len(hops)))


def _same_shard(setup: Setup) -> list[range]:
    """The ranks that hold the same shard, one of each replica."""
    shards = setup.world_size // setup.replicas
    return [range(first, setup.world_size, shards) for first in range(shards)]


def _memory(setup: Setup, present: int) -> dict[str, Memory]:
    """The rows of all languages, two each where Grams are crossed, stay once they have come; those of one bucket at a
    time are combined on the device.

    Buffers of the exchange, one or two buckets, come on top.
    """
    rows = {storage: setup.rows * setup.shard * size for storage, size in ROW_BYTES.items()}
    one_bucket = present * -(-setup.shard // setup.buckets) * ROW_BYTES["float32"]
    memory = {
        "float32": Memory(rows["float32"]),
        "bfloat16": Memory(rows["bfloat16"]),
        "host": Memory(one_bucket, rows["host"]),
    }
    return memory | ({"streaming": Memory(one_bucket)} if setup.exchanges == 1 else {})


def _warnings(setup: Setup, exchange: str) -> list[str]:
    found = []
    languages, places, by_node = setup.languages, setup.places(exchange), setup.places("two_stage")
    if languages == 1:
        found.append("one language has no other to be in conflict with: averaging does the same")
    if exchange == "flat" and setup.several_nodes:
        turns = f'exchange = "two_stage" takes {by_node} of {languages} languages a window, in turn'
        way_out = 'use exchange = "auto"' if by_node >= languages else f"{_more_places(setup, setup.nodes)}; {turns}"
        found.append(
            f"the ranks of a node train on different languages, so that {setup.ranks_per_node} times the bytes of two "
            f"stages go between nodes: {way_out}"
        )
    if places < languages:
        found.append(
            f"a window covers {places} of {languages} languages, in turn, and does not see their conflicts with the "
            f"others: {_more_places(setup, places // setup.exchanges)}"
        )
    elif setup.gram == "cross" and setup.rows_of_a_window(exchange) < setup.rows:
        found.append(
            'gram = "cross": a language that has one place in a window has no second half, and its noise stays on the '
            f"diagonal of its Gram: {_more_places(setup, places // setup.exchanges, setup.rows)}"
        )
    return found


def _more_places(setup: Setup, places: int, wanted: int = 0) -> str:
    """How all languages, or so many halves of them, find one of so many places in a micro-step."""
    steps = max(-(-(wanted or setup.languages) // places), setup.micro_steps)
    if setup.exchanges == setup.micro_steps:
        return f"use micro_steps = {steps}"
    return f"exchange in every micro-step (without once_a_window, ZeRO-2 for 0 or 1), with micro_steps = {steps}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
