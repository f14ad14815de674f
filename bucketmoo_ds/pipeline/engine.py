"""The pipeline of a window: exchange, gram, solve, combine. Knows rows and ranks, and no framework.

An adapter drives it: `begin_micro_step`, `ingest` for every bucket (in one order, the same on all ranks),
`end_micro_step`, and, at the boundary, `finish`. Each combined shard goes to the adapter's sink.

*Streaming* resolves a bucket as soon as it has arrived and keeps nothing; small buckets wait for each other, so that
their Grams travel together. *Deferred* keeps the rows of the window; `finish` then resolves all of them at once. With
one exchange a window and blocks within buckets both take the same Grams of the same rows, and results are equal to the
bit; but where gradients travel in 16 bits and a language comes from one rank, streaming takes the Gram of the 16-bit
row instead of a float32 copy, and a fast backend adds it up in another order.

With `gram_every` = R, weights are solved in one of R windows. Where the others have one exchange, each bucket is added
up with its weights as it arrives, whatever its blocks; else their rows are kept, but no Grams are taken.

On an accelerator nothing waits for the device until `finish` reads what was decided.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import struct
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.comm.agreement import Contributions, check_equal, digest, tell_ranks
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.comm.streams import SideStream
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.batch import Row, Slot
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.pipeline import checks
from bucketmoo_ds.pipeline.memory import NO_MEMORY
from bucketmoo_ds.pipeline.resolution import Record, Resolution
from bucketmoo_ds.pipeline.resolver import Decided, Resolver
from bucketmoo_ds.pipeline.steering import Steering
from bucketmoo_ds.pipeline.store import RowStore
from bucketmoo_ds.pipeline.window import Window, merged_by_node
from bucketmoo_ds.plan.blocks import BlockPlan, Segments
from bucketmoo_ds.plan.choices import choose_streaming, named

Sink = Callable[[int, Tensor], None]

# Elements. While streaming, buckets that have fewer together are resolved together: a collective of their Grams costs
# about as much time as exchanging so many.
TOGETHER = 1 << 20


@dataclasses.dataclass
class _Pending:
    bucket: int
    received: Received
    arriving: _Arriving
    last: bool  # of this bucket in the window


class _Held(NamedTuple):
    """A bucket that has arrived, to be resolved."""

    bucket: int
    rows: list[Tensor]  # [S] each
    gram: Tensor  # [C, K', K'], this rank's part


class _Arriving(NamedTuple):
    """What the slices of a bucket are in a micro-step."""

    fed: list[tuple[Row, int, float]]  # row, place among the slices and scale of each that holds a gradient
    targets: list[int]  # of each slice, its row among those present; -1 where it holds no gradient
    scales: list[float]  # of each slice, in units of its row
    one_each: bool  # whether they are the rows: each comes from one rank, in the units of its row


class BucketMOO:
    """Resolves the gradients of one data-parallel group, window by window.

    Args:
        config: the settings.
        plan: buckets and blocks.
        exchange: the group's collectives.
        sink: called with (bucket, combined shard `[S]`) for every bucket of a window. Whether all its rows were finite
            is known when `finish` returns.
        micro_steps: tells M, micro-steps between two optimizer steps, as the framework has it now; asked anew in every
            micro-step.
        once_a_window: whether gradients are exchanged once a window: each rank adds up its micro-steps until then.
        apart: whether it then keeps the sums of its languages apart, and hands over one after the other.
        segments: for each bucket the segments of this rank's shard; left out where shard j is the j-th slice of the
            bucket's parameters laid one after the other.
        result_dtype: dtype of the combined shards.
        overlap: whether a bucket's exchange may run while backward goes on.
        device: where the gradients lie.

    Raises:
        ConfigError: an unknown aggregator, option or backend, or `streaming` where it cannot be.
    """

    def __init__(
        self,
        config: BucketMOOConfig,
        plan: BlockPlan,
        exchange: Exchange,
        sink: Sink,
        *,
        micro_steps: Callable[[], int],
        once_a_window: bool,
        apart: bool = False,
        segments: Sequence[Segments] | None = None,
        result_dtype: torch.dtype = torch.float32,
        overlap: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.plan = plan
        self.exchange = exchange
        self.result_dtype = result_dtype
        if config.mode == "mixed":
            raise ConfigError(
                f'{SECTION}.mode = "mixed": this adapter exchanges rows, of micro-batches of one language each; call '
                "bucketmoo_ds.mixed.register(model, config), which works under every wrapper, or leave the mode out"
            )
        if config.exchange == "two_stage" and exchange.nodes == 1:
            raise ConfigError(
                f'{SECTION}.exchange = "two_stage": the ranks do not form nodes of equally many; use "auto"'
            )
        if config.gram == "cross" and once_a_window and not apart and exchange.world_size == 1:
            raise ConfigError(
                f'{SECTION}.gram = "cross": one rank that adds up its micro-steps has no two halves of a language; '
                "leave once_a_window out, so that rows are kept in every micro-step, or leave gram out"
            )
        self.backend = ops.choose_backend(config.backend, device)
        self.window = Window(
            len(config.languages),
            config.weighting,
            once_a_window,
            apart,
            probe=config.probe,
            crossed=config.gram == "cross",
            together=exchange.ranks_per_node if self._goes_by_node else 1,
        )
        self._device = torch.device(device)
        self.resolver = Resolver(config, plan, exchange, self.window, self.backend, self._device)
        self.record = Record(config, plan, speaks=exchange.rank == 0)
        self.steering = Steering(config)
        self._micro_steps = micro_steps
        self._sink = sink
        self._side = SideStream(self._device)
        self._depth = 1 if overlap else 0
        self._store = RowStore(config.row_storage)
        self._contributions = Contributions([parameter.name for parameter in plan.parameters])
        self._cells = [plan.cells_of(bucket) for bucket in range(len(plan.buckets))]
        self._segments = segments or [self._shard_segments(bucket) for bucket in range(len(plan.buckets))]
        settings = {**config.to_json(), "backend": self.backend, "once_a_window": once_a_window}
        self._fingerprint = digest((json.dumps(settings, sort_keys=True) + plan.fingerprint()).encode())
        self._streams = self.streaming
        self._start_window()

    def check_ranks(self) -> None:
        """Compares the settings and blocks of all ranks before the first step, whose collectives would not fit.

        Raises:
            DisagreementError: on every rank, if they differ.
        """
        check_equal(
            self.exchange,
            struct.pack("<qq", self._fingerprint, self.micro_steps),
            "ranks disagree about the settings, the trained parameters or how they are wrapped: run one script on all",
        )

    # --- the four calls of an adapter, in their order -----------------------------------------------------------

    def begin_micro_step(self, slot: Slot | LanguageError, boundary: bool) -> None:
        """Tells all ranks what this rank trains on in this micro-step, and learns what the others do.

        Args:
            slot: this rank's micro-batch, or the error that finding its language gave; every rank then raises.
            boundary: whether this is the window's last micro-step.

        Raises:
            LanguageError: on every rank, if one of them has no valid micro-batch.
            DisagreementError: on every rank, if their positions, plans or settings differ.
            ConfigError: on every rank, if `streaming` was asked for and M no longer allows it.
        """
        position = {
            "window": self.windows,
            "micro-step": self.window.micro_steps,
            "boundary": int(boundary),
            "number of micro-steps in a window": self.micro_steps,
            "settings or blocks": self._fingerprint,
        }
        error, mine = (str(slot), Slot(-1, 0, 0.0)) if isinstance(slot, LanguageError) else ("", slot)
        told = tell_ranks(self.exchange, mine.to_numbers(), error, position)
        self.resolver.add_loss(mine)
        slots = [Slot.from_numbers(numbers) for numbers in told]
        checks.check_steers(self.steering.mixture is not None, self.config)
        self._side.follow()
        checks.check_languages(self.window, slots, self.config.languages)
        if not self.in_window:
            self._streams = self.streaming if self.resolver.fresh else self._exchanges == 1
        self.window.add(slots)
        self._check_nodes()
        self._boundary = boundary
        if boundary:
            checks.check_present(self.window, self.config)
            checks.check_parts(self.window, self.config.mode)
            self._streams = self._streams and self.window.parts == 1
        parts = range(self.window.parts)
        self._by_node = [self._merged(self.window.sources(part)) for part in parts]
        self._of_part = [self._arriving(part) for part in parts]

    def ingest(self, bucket: int, flat: Tensor, part: int = 0) -> None:
        """Takes this rank's gradient of a bucket: `[W * S]`, zero-padded, of the slot in `Window.sources(part)`.

        `flat` is lent to the engine until `end_micro_step` returns. Its exchange waits for what has made it; those that
        are on their way are received and resolved beside the kernels of backward that are queued by now.
        """
        self._pending.append(self._send(bucket, flat, part))
        with self._side.beside():
            self._receive(self._depth)

    def end_micro_step(self, contributed: Sequence[bool]) -> None:
        """Waits for this micro-step's buckets. What the caller queues from here on may write where they lay.

        Args:
            contributed: for each parameter of the plan, whether this rank had a gradient for it.
        """
        self._side.follow()
        with self._side.beside():
            self._receive(0)
            self._resolve_held()
        self._side.join()
        self._contributions.add(contributed)

    def check_contributions(self) -> None:
        """Compares for which parameters ranks had gradients, before the window's end; `finish` does it there.

        Raises:
            DisagreementError: on every rank, if they differ.
        """
        self._contributions.check(self.exchange)

    def finish(self, gradient_scale: float = 1.0) -> Resolution:
        """Resolves what is not resolved yet and closes the window.

        Args:
            gradient_scale: what losses were multiplied by (fp16's loss scale); the resolution's Grams are without it.

        Raises:
            DisagreementError: on every rank, if the ranks had gradients of different parameters.
            BucketMOOError: a bucket was not resolved.
            ConfigError: on every rank, see `checks.check_left_out`.
        """
        self.check_contributions()
        self._check_complete(self._resolved if self._streams else self._complete)
        self._side.follow()
        with self._side.beside():
            if not self._streams:
                self._resolve_rows()
            decided = self.resolver.decided() if self.resolver.fresh else self._decided_before()
        self._side.join()
        if self.resolver.fresh:
            self.record.note_one_half(self.window.of_one_half)
            checks.check_left_out(decided.gram, self.plan, self.config.languages)
        resolution = Resolution(
            window=self.windows,
            gram=decided.gram / gradient_scale**2 if self.resolver.fresh else decided.gram,
            weights=decided.weights,
            present=tuple(self.window.present),
            target_tokens=tuple(self.window.target_tokens),
            nonfinite=decided.nonfinite,
            fresh=self.resolver.fresh,
            losses=decided.losses,
            left_out=self.plan.left_out,
        )
        self.steering.move(resolution, self.window)
        self.resolver.close_window(resolution)
        self.record.add(resolution)
        self._start_window()
        return resolution

    def abandon(self) -> None:
        """Gives the window up: what it has gathered is forgotten, and the next micro-step is its first again. All ranks
        have to do it."""
        while self._pending:
            self._pending.popleft().received.wait()
        self._side.join()
        self._start_window()

    # --- what others ask ----------------------------------------------------------------------------------------

    @property
    def micro_steps(self) -> int:
        """M, as the framework has it now."""
        return self._micro_steps()

    @property
    def streaming(self) -> bool:
        """Whether a window that begins now is resolved as its buckets arrive."""
        return choose_streaming(self.config, self.plan, self._exchanges)

    @property
    def in_window(self) -> bool:
        """Whether micro-steps have been taken that no optimizer step has used yet."""
        return self.window.micro_steps > 0

    @property
    def windows(self) -> int:
        """How many windows are resolved."""
        return self.record.windows

    @property
    def counters(self) -> collections.Counter[str]:
        """See `Record`."""
        return self.record.counters

    @property
    def last(self) -> Resolution | None:
        """The latest window's resolution."""
        return self.record.last

    @property
    def row_bytes(self) -> int:
        """Bytes of this rank's row store; 0 while streaming."""
        return self._store.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain JSON values; alike on all ranks."""
        kept = (self.record, self.resolver.memory, self.resolver.reuse, self.steering)
        return {name: value for each in kept for name, value in each.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: see `Record.load_state_dict`, `Memory.load_state_dict` and `Reuse.load_state_dict`.
        """
        self.record.load_state_dict(state)
        self.resolver.reuse.load_state_dict(state)
        if not self.resolver.memory.load_state_dict(state):
            self.record.warn(NO_MEMORY.format(self.config.aggregator))
        self.resolver.start_window()
        self.steering.load_state_dict(state)

    def describe(self) -> str:
        """Returns the line that is logged at start-up."""
        config = self.config
        return (
            f"bucket_moo: aggregator {config.aggregator}, granularity {config.granularity} "
            f"({len(self.plan.blocks)} blocks in {len(self.plan.buckets)} buckets), "
            f"{len(config.languages)} languages ({named(config)}), "
            f"world size {self.exchange.world_size}, {self.micro_steps} micro-steps a window, "
            f"{'streaming' if self.streaming else 'deferred'}{self._crossed}, "
            f"{self._exchange_name}, "
            f"backend {self.backend}{self._gram_every}"
        )

    @property
    def _crossed(self) -> str:
        if self.config.gram != "cross":
            return ""
        return ", Grams across halves" + (" (twice the rows in memory)" if not self.streaming else "")

    @property
    def _gram_every(self) -> str:
        every = self.resolver.reuse.every
        return f", Grams every {every} windows" if every > 1 else ""

    @property
    def _exchanges(self) -> int:
        return 1 if self.window.once_a_window else self.micro_steps

    @property
    def _goes_by_node(self) -> bool:
        return self.exchange.nodes > 1 and self.config.exchange != "flat"

    @property
    def _exchange_name(self) -> str:
        if self.exchange.world_size == 1:
            return "nothing to exchange"
        how = "flat all-to-all"
        if self._goes_by_node:
            how = f"in two stages ({self.exchange.nodes} nodes of {self.exchange.ranks_per_node} ranks)"
        return f"exchange {how} {'once a window' if self.window.once_a_window else 'every micro-step'}"

    # --- how it is done -----------------------------------------------------------------------------------------

    def _start_window(self) -> None:
        self._boundary = False
        self._pending: collections.deque[_Pending] = collections.deque()
        self._grams: dict[int, Tensor] = {}
        self._complete: set[int] = set()
        self._resolved: set[int] = set()
        self._largest: dict[int, Tensor] = {}
        self._weights: Tensor | None = None
        self._held: list[_Held] = []
        self.window.clear()
        self.resolver.start_window()
        self._store.clear()
        self._contributions.clear()

    def _send(self, bucket: int, flat: Tensor, part: int) -> _Pending:
        last = self._boundary and part == self.window.parts - 1
        by_node = self._by_node[part]
        if by_node is None:
            return _Pending(bucket, self.exchange.scatter(flat), self._of_part[part], last)
        mine = self.window.sources(part)[self.exchange.rank]
        of_node = by_node[self.exchange.rank // self.exchange.ranks_per_node]
        if mine.target_tokens == 0:
            flat.zero_()
        elif mine.scale != of_node.scale:
            flat.mul_(mine.scale / of_node.scale)
        return _Pending(bucket, self.exchange.scatter_by_node(flat), self._of_part[part], last)

    def _receive(self, depth: int) -> None:
        """Takes in arrived buckets until at most `depth` are under way. The order is the same on every rank."""
        while len(self._pending) > depth:
            pending = self._pending.popleft()
            slices = pending.received.wait()
            if self._streams and not self.resolver.fresh:
                self._add_up(pending.bucket, slices, pending.arriving)
            elif self._streams:
                self._stream(pending.bucket, slices, pending.arriving)
            else:
                self._keep_rows(pending, slices)
            self._side.keep(slices, *pending.received.sent)

    def _keep_rows(self, pending: _Pending, slices: Tensor) -> None:
        """Adds what has come to the rows of the window, and takes their Grams if it was the last of it."""
        bucket, arriving = pending.bucket, pending.arriving
        if pending.last:
            self._complete.add(bucket)
        if pending.last and self._store.is_float32_on_device and self.resolver.fresh:
            receiving = {row for row, _, _ in arriving.fed}
            claim = self._store.claim(bucket, self.window.rows, receiving, slices[0])
            self._grams[bucket] = self._accumulate_gram(bucket, *claim, slices, arriving)
            return
        for row, place, scale in arriving.fed:
            self._store.add(bucket, row, slices[place], scale)
        if pending.last and self.resolver.fresh:
            self._grams[bucket] = self._gram(bucket, self._rows(bucket))

    def _arriving(self, part: int) -> _Arriving:
        """Of the slots that exchange this part, by rank or by node."""
        window = self.window
        slots = self._by_node[part] or window.sources(part)
        place_of = {row: place for place, row in enumerate(window.rows)}
        targets, scales, fed = [-1] * len(slots), [0.0] * len(slots), []
        for place, slot in enumerate(slots):
            if slot.target_tokens > 0:
                targets[place] = place_of[slot.row]
                scales[place] = slot.scale / window.reference_scale(slot.row)
                fed.append((slot.row, place, scales[place]))
        fed.sort()
        rows = [targets[place] for _, place, _ in fed]
        one_each = rows == list(range(len(window.rows))) and all(scale == 1.0 for _, _, scale in fed)
        return _Arriving(fed, targets, scales, one_each)

    def _stream(self, bucket: int, slices: Tensor, arriving: _Arriving) -> None:
        if arriving.one_each:
            rows = [slices[place] for _, place, _ in arriving.fed]  # no copy
            gram = self._gram(bucket, rows)
        else:
            rows = list(slices.new_empty((len(self.window.rows), slices.shape[1]), dtype=torch.float32).unbind())
            gram = self._accumulate_gram(bucket, rows, [True] * len(rows), slices, arriving)
        self._held.append(_Held(bucket, rows, gram))
        if sum(self.plan.buckets[each.bucket].numel for each in self._held) >= TOGETHER:
            self._resolve_held()

    def _resolve_held(self) -> None:
        """Resolves the buckets that wait for each other."""
        held, self._held = self._held, []
        if not held:
            return
        cells = [self._cells[each.bucket] for each in held]
        partial = torch.cat([each.gram for each in held])
        weights = self.resolver.resolve_some(partial, list(itertools.chain(*cells)), self.record.generator())
        for each, of_bucket in zip(held, weights.split(list(map(len, cells))), strict=True):
            self._combine(each.bucket, each.rows, of_bucket)
            self._side.keep(*each.rows)

    def _resolve_rows(self) -> None:
        """Resolves the stored rows of all buckets at once."""
        buckets, of = range(len(self.plan.buckets)), self.window.rows
        if self.resolver.fresh:
            partial = torch.cat([self._grams[bucket] for bucket in buckets])
            weights = self.resolver.resolve_all(partial, self.record.generator())
        else:
            weights = self.resolver.reused(of, [1.0] * len(of))
        for bucket, of_bucket in zip(buckets, weights.split(list(map(len, self._cells))), strict=True):
            rows = self._rows(bucket)
            if not self.resolver.fresh:
                self._largest[bucket] = _largest(rows)
            self._combine(bucket, rows, of_bucket)

    def _add_up(self, bucket: int, slices: Tensor, arriving: _Arriving) -> None:
        """Adds up what has come with the weights of an earlier window."""
        of, places, scales = zip(*arriving.fed, strict=True)
        if self._weights is None:
            self._weights = self.resolver.reused(of, scales)
        rows = [slices[place] for place in places]
        self._largest[bucket] = _largest(rows)
        first = sum(map(len, self._cells[:bucket]))
        self._combine(bucket, rows, self._weights[first : first + len(self._cells[bucket])])

    def _decided_before(self) -> Decided:
        streamed = [row for row, _, _ in self._of_part[0].fed]
        largest = torch.stack([self._largest[bucket] for bucket in range(len(self.plan.buckets))])
        return self.resolver.decided_before(largest, streamed if self._streams else self.window.rows)

    def _rows(self, bucket: int) -> list[Tensor]:
        """The stored rows of the window, on the device."""
        return [row.to(self._device, non_blocking=True) for row in self._store.rows(bucket, self.window.rows)]

    def _accumulate_gram(
        self, bucket: int, rows: list[Tensor], fresh: list[bool], slices: Tensor, arriving: _Arriving
    ) -> Tensor:
        """Adds the last gradients of the window to its rows; returns the partial Grams."""
        segments = self._segments[bucket]
        return ops.accumulate_gram(
            rows,
            slices,
            arriving.targets,
            arriving.scales,
            fresh,
            segments.spans,
            segments.cells,
            segments.num_cells,
            backend=self.backend,
        )

    def _gram(self, bucket: int, rows: list[Tensor]) -> Tensor:
        segments = self._segments[bucket]
        return ops.gram(rows, segments.spans, segments.cells, segments.num_cells, backend=self.backend)

    def _combine(self, bucket: int, rows: list[Tensor], weights: Tensor) -> None:
        segments = self._segments[bucket]
        out = torch.empty_like(rows[0], dtype=self.result_dtype)
        ops.combine(rows, weights, segments.spans, segments.cells, out, backend=self.backend)
        self._sink(bucket, out)
        self._resolved.add(bucket)

    def _merged(self, sources: list[Slot]) -> list[Slot] | None:
        """One slot for each node, where gradients go by node now."""
        return merged_by_node(sources, self.exchange.ranks_per_node) if self._goes_by_node else None

    def _check_nodes(self) -> None:
        """Where nodes cannot train on one language each: an error if that was asked for, else a warning, once."""
        if self._goes_by_node and self._merged(self.window.latest) is None:
            advice = checks.flat_advice(self.exchange.ranks_per_node, self.config.exchange)
            self.record.note_flat_micro_step(advice)

    def _check_complete(self, done: Container[int]) -> None:
        missing = [bucket.name for index, bucket in enumerate(self.plan.buckets) if index not in done]
        if missing:
            total = len(self.plan.buckets)
            raise BucketMOOError(f"{len(missing)} of {total} buckets were not resolved, first {missing[0]}")

    def _shard_segments(self, bucket: int) -> Segments:
        numel = self.exchange.shard_numel(self.plan.buckets[bucket].numel)
        return self.plan.segments(bucket, self.exchange.rank * numel, (self.exchange.rank + 1) * numel)


def _largest(rows: Sequence[Tensor]) -> Tensor:
    """Returns `[K]`, the largest absolute value of each row; not finite where one of its elements is not."""
    return torch.stack([torch.linalg.vector_norm(row, ord=math.inf) for row in rows])
