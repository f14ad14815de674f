"""The pipeline of a window: exchange, gram, solve, combine. Knows rows and ranks, and no framework.

An adapter drives it: `begin_micro_step`, `ingest` for every bucket (in the plan's order, the same on all ranks),
`end_micro_step`, and, at the boundary, `finish`. Each combined shard goes to the adapter's sink.

*Streaming* resolves a bucket as soon as it has arrived and keeps nothing. *Deferred* keeps the rows of the window;
`finish` then does one all-reduce of all Grams, one batched solve, and combines. With one exchange a window and blocks
within buckets both take the same Grams of the same rows, and results are equal to the bit; but where gradients travel
in 16 bits and a language comes from one rank, streaming takes the Gram of the 16-bit row instead of a float32 copy, and
a fast backend adds it up in another order.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import struct
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.comm.agreement import Contributions, check_equal, digest, tell_ranks
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.comm.streams import SideStream
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.logs import logger
from bucketmoo_ds.pipeline.store import RowStore
from bucketmoo_ds.pipeline.window import Window, merged_by_node
from bucketmoo_ds.plan.blocks import BlockPlan, Segments
from bucketmoo_ds.plan.choices import choose_streaming, create_aggregator

Sink = Callable[[int, Tensor], None]


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What was decided in one window. `B` blocks, `K` languages; entries of absent languages are 0.

    Args:
        window: number of the window, from 0.
        gram: `[B, K, K]` float64, of the rows as the aggregator saw them (means per target token).
        weights: `[B, K]` float64: the combined gradient of block b is the sum of `weights[b, l] row_l`.
        present: the languages that took part.
        target_tokens: tokens that each of the K languages fed to the window.
        nonfinite: (language, bucket) names whose row was not finite; not empty means that the step is skipped.
    """

    window: int
    gram: Tensor
    weights: Tensor
    present: tuple[int, ...]
    target_tokens: tuple[int, ...]
    nonfinite: tuple[tuple[str, str], ...]

    @property
    def mask(self) -> Tensor:
        """`[B, K]` bool: which languages took part."""
        mask = torch.zeros(self.weights.shape, dtype=torch.bool)
        mask[:, list(self.present)] = True
        return mask


@dataclasses.dataclass
class _Pending:
    bucket: int
    received: Received
    sources: list[Slot]
    last: bool  # of this bucket in the window


class _Incoming(NamedTuple):
    gradient: Tensor  # [S]
    language: int
    scale: float


class BucketMOO:
    """Resolves the gradients of one data-parallel group, window by window.

    Args:
        config: the settings.
        plan: buckets and blocks.
        exchange: the group's collectives.
        sink: called with (bucket, combined shard `[S]`) for every bucket of a window that is not skipped.
        micro_steps: M, micro-steps between two optimizer steps.
        local: whether each rank adds up its micro-steps before they are exchanged at the boundary (ZeRO-1, `no_sync`).
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
        micro_steps: int,
        local: bool,
        apart: bool = False,
        segments: Sequence[Segments] | None = None,
        result_dtype: torch.dtype = torch.float32,
        overlap: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.plan = plan
        self.exchange = exchange
        self.micro_steps = micro_steps
        self.result_dtype = result_dtype
        if config.exchange == "two_stage" and exchange.nodes == 1:
            raise ConfigError(
                f'{SECTION}.exchange = "two_stage": the ranks do not form nodes of equally many; use "auto"'
            )
        self.aggregator = create_aggregator(config)
        self.backend = ops.choose_backend(config.backend, device)
        self.streaming = choose_streaming(config, plan, exchanges=1 if local else micro_steps)
        self.window = Window(len(config.languages), config.weighting, local, apart)
        self.windows = 0
        self.counters: collections.Counter[str] = collections.Counter()
        self.last: Resolution | None = None
        self._sink = sink
        self._device = torch.device(device)
        self._side = SideStream(self._device)
        self._depth = 1 if overlap else 0
        self._store = RowStore(config.row_storage)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._boundary = False
        self._parts = 1
        self._contributions = Contributions([parameter.name for parameter in plan.parameters])
        self._cells = [plan.cells_of(bucket) for bucket in range(len(plan.buckets))]
        self._segments = segments or [self._shard_segments(bucket) for bucket in range(len(plan.buckets))]
        settings = {**config.to_json(), "backend": self.backend, "micro_steps": micro_steps, "local": local}
        self._fingerprint = digest((json.dumps(settings, sort_keys=True) + plan.fingerprint()).encode())
        self._reset_results()

    def check_ranks(self) -> None:
        """Compares the settings and blocks of all ranks before the first step, whose collectives would not fit.

        Raises:
            DisagreementError: on every rank, if they differ.
        """
        check_equal(
            self.exchange,
            struct.pack("<q", self._fingerprint),
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
        """
        position = {
            "window": self.windows,
            "micro-step": len(self.window.table),
            "boundary": int(boundary),
            "settings or blocks": self._fingerprint,
        }
        error, mine = (str(slot), Slot(-1, 0, 0.0)) if isinstance(slot, LanguageError) else ("", slot)
        told = tell_ranks(self.exchange, mine.to_numbers(), error, position)
        slots = [Slot.from_numbers(numbers) for numbers in told]
        self._check_languages(slots)
        self.window.add(slots)
        self._check_nodes()
        self._boundary = boundary
        if boundary and not self.window.present:
            raise LanguageError("no language fed a target token to this window: there is nothing to resolve")
        self._parts = self.window.parts
        if self.config.mode == "streaming" and boundary and self._parts > 1:
            raise LanguageError(
                f'{SECTION}.mode = "streaming": a rank went from one language to another within a window, whose parts '
                'are then exchanged one after the other; keep one language (LanguageBatchSampler(affinity="window")), '
                'or use "auto"'
            )

    def ingest(self, bucket: int, flat: Tensor, part: int = 0) -> None:
        """Takes this rank's gradient of a bucket: `[W * S]`, zero-padded, of the slot in `Window.sources(part)`.

        `flat` belongs to the engine from here on.
        """
        with self._side.after_current(flat):
            self._pending.append(self._send(bucket, flat, part))
            self._receive(self._depth)

    def end_micro_step(self, contributed: Sequence[bool]) -> None:
        """Waits for this micro-step's buckets.

        Args:
            contributed: for each parameter of the plan, whether this rank had a gradient for it.
        """
        with self._side.after_current():
            self._receive(0)
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
            DisagreementError: on every rank, if the ranks had gradients of different parameters, or other weights.
            BucketMOOError: a bucket was not resolved.
        """
        self.check_contributions()
        self._check_complete(self._resolved if self._streams else self._grams)
        if not self._streams:
            with self._side.after_current():
                self._resolve_rows()
        self._side.join()
        check_equal(
            self.exchange,
            self._block_weights.numpy().tobytes(),
            "the ranks reached different weights from the same Grams",
        )
        resolution = Resolution(
            window=self.windows,
            gram=self._block_gram / gradient_scale**2,
            weights=self._block_weights,
            present=tuple(self.window.present),
            target_tokens=tuple(self.window.target_tokens),
            nonfinite=tuple(self._nonfinite),
        )
        self._close(resolution)
        return resolution

    # --- state that a checkpoint keeps --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain JSON values.

        Random orders are derived from (seed, window), so the number of windows is all the random state there is.
        """
        return {"windows": self.windows, "counters": dict(self.counters), "fingerprint": self.plan.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: the state is of another model, bucket size or granularity.
        """
        if state["fingerprint"] != self.plan.fingerprint():
            raise ConfigError(
                f"the checkpoint's blocks are not this run's (fingerprint {state['fingerprint']}, here "
                f"{self.plan.fingerprint()}): use the same model, zero_optimization.reduce_bucket_size and "
                f"{SECTION}.granularity"
            )
        self.windows = int(state["windows"])
        self.counters = collections.Counter({str(key): int(value) for key, value in state["counters"].items()})

    @property
    def row_bytes(self) -> int:
        """Bytes of this rank's row store; 0 while streaming."""
        return self._store.nbytes

    @property
    def in_window(self) -> bool:
        """Whether micro-steps have been taken that no optimizer step has used yet."""
        return bool(self.window.table)

    def describe(self) -> str:
        """Returns the line that is logged at start-up."""
        config = self.config
        return (
            f"bucket_moo: aggregator {config.aggregator}, granularity {config.granularity} "
            f"({len(self.plan.blocks)} blocks in {len(self.plan.buckets)} buckets), "
            f"{len(config.languages)} languages ({', '.join(config.languages)}), "
            f"world size {self.exchange.world_size}, {self.micro_steps} micro-steps a window, "
            f"{'streaming' if self.streaming else 'deferred'}, "
            f"{self._exchange_name}, "
            f"backend {self.backend}"
        )

    @property
    def _streams(self) -> bool:
        """Whether the buckets of this window are resolved as they arrive."""
        return self.streaming and self._parts == 1

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
        return f"exchange {how} {'once a window' if self.window.local else 'every micro-step'}"

    # --- how it is done -----------------------------------------------------------------------------------------

    def _send(self, bucket: int, flat: Tensor, part: int) -> _Pending:
        sources, last = self.window.sources(part), self._boundary and part == self._parts - 1
        by_node = self._merged(sources)
        if by_node is None:
            return _Pending(bucket, self.exchange.scatter(flat), sources, last)
        mine, of_node = sources[self.exchange.rank], by_node[self.exchange.rank // self.exchange.ranks_per_node]
        if mine.target_tokens == 0:
            flat.zero_()
        elif mine.scale != of_node.scale:
            flat.mul_(mine.scale / of_node.scale)
        return _Pending(bucket, self.exchange.scatter_by_node(flat), by_node, last)

    def _resolve_rows(self) -> None:
        """Resolves the stored rows of all buckets at once."""
        buckets = range(len(self.plan.buckets))
        partial = torch.cat([self._grams[bucket] for bucket in buckets])
        weights = self._resolve(partial, range(len(self.plan.cell_block)))
        for bucket, of_bucket in zip(buckets, weights.split([len(cells) for cells in self._cells]), strict=True):
            self._combine(bucket, self._rows(bucket), of_bucket)

    def _receive(self, depth: int) -> None:
        """Takes in arrived buckets until at most `depth` are under way. The order is the same on every rank."""
        while len(self._pending) > depth:
            pending = self._pending.popleft()
            slices = pending.received.wait()
            if self._streams:
                self._stream(pending.bucket, slices, pending.sources)
                continue
            incoming = self._incoming(slices, pending.sources)
            if pending.last and self._store.is_float32_on_device:
                languages = self.window.present
                claim = self._store.claim(pending.bucket, languages, {each.language for each in incoming}, slices[0])
                self._grams[pending.bucket] = self._accumulate_gram(pending.bucket, *claim, incoming)
                continue
            for gradient, language, scale in incoming:
                self._store.add(pending.bucket, language, gradient, scale)
            if pending.last:
                self._grams[pending.bucket] = self._gram(pending.bucket, self._rows(pending.bucket))

    def _rows(self, bucket: int) -> list[Tensor]:
        """The stored rows of the present languages, on the device."""
        return [row.to(self._device) for row in self._store.rows(bucket, self.window.present)]

    def _merged(self, sources: list[Slot]) -> list[Slot] | None:
        """One slot for each node, where gradients go by node now."""
        if not self._goes_by_node:
            return None
        return merged_by_node(sources, self.exchange.ranks_per_node)

    def _incoming(self, slices: Tensor, sources: list[Slot]) -> list[_Incoming]:
        return [
            _Incoming(piece, slot.language, slot.scale / self.window.reference_scale(slot.language))
            for piece, slot in zip(slices, sources, strict=True)
            if slot.target_tokens > 0
        ]

    def _stream(self, bucket: int, slices: Tensor, sources: list[Slot]) -> None:
        incoming = sorted(self._incoming(slices, sources), key=lambda each: each.language)
        if len(incoming) == len(self.window.present) and all(each.scale == 1.0 for each in incoming):
            rows = [each.gradient for each in incoming]  # each language comes from one rank: no copy
            gram = self._gram(bucket, rows)
        else:
            rows = [torch.empty_like(slices[0], dtype=torch.float32) for _ in self.window.present]
            gram = self._accumulate_gram(bucket, rows, [True] * len(rows), incoming)
        self._combine(bucket, rows, self._resolve(gram, self._cells[bucket]))

    def _accumulate_gram(self, bucket: int, rows: list[Tensor], fresh: list[bool], incoming: list[_Incoming]) -> Tensor:
        """Adds the last gradients of the window to the rows of the present languages; returns the partial Grams."""
        segments = self._segments[bucket]
        row_of = {language: row for row, language in enumerate(self.window.present)}
        return ops.accumulate_gram(
            rows,
            [each.gradient for each in incoming],
            [row_of[each.language] for each in incoming],
            [each.scale for each in incoming],
            fresh,
            segments.spans,
            segments.cells,
            segments.num_cells,
            backend=self.backend,
        )

    def _gram(self, bucket: int, rows: list[Tensor]) -> Tensor:
        segments = self._segments[bucket]
        return ops.gram(rows, segments.spans, segments.cells, segments.num_cells, backend=self.backend)

    def _resolve(self, partial: Tensor, cells: Sequence[int]) -> Tensor:
        """This rank's part `[C, K', K']` of the Grams of some cells, to the weights `[C, K']` of the stored rows; K'
        languages are present."""
        coefficients = torch.tensor(self.window.coefficients(), dtype=torch.float64)
        gram = self.exchange.all_reduce(partial).cpu() * torch.outer(coefficients, coefficients)
        self._note_nonfinite(gram, cells)
        blocks = torch.tensor([self.plan.cell_block[cell] for cell in cells])
        used, position = blocks.unique(return_inverse=True)
        summed = torch.zeros(len(used), *gram.shape[1:], dtype=torch.float64).index_add_(0, position, gram)
        with ops.using(self.backend):
            weights = aggregate.solve(
                summed,
                torch.ones(summed.shape[:2], dtype=torch.bool),
                self.aggregator,
                normalize=self.config.normalize,
                rescale=self.config.rescale,
                generator=self._generator(),
            )
        present = torch.tensor(self.window.present)
        self._block_gram[used[:, None, None], present[:, None], present] = summed
        self._block_weights[used[:, None], present] = weights
        return (weights * coefficients)[position]

    def _combine(self, bucket: int, rows: list[Tensor], weights: Tensor) -> None:
        if not self._nonfinite:
            segments = self._segments[bucket]
            out = torch.empty_like(rows[0], dtype=self.result_dtype)
            ops.combine(rows, weights, segments.spans, segments.cells, out, backend=self.backend)
            self._sink(bucket, out)
        self._resolved.add(bucket)

    def _note_nonfinite(self, gram: Tensor, cells: Sequence[int]) -> None:
        bad = ~torch.isfinite(gram.diagonal(dim1=1, dim2=2))
        for cell, index in bad.nonzero().tolist():
            language = self.config.languages[self.window.present[index]]
            where = (language, self.plan.buckets[self.plan.cell_bucket[cells[cell]]].name)
            if where not in self._nonfinite:
                self._nonfinite.append(where)

    def _close(self, resolution: Resolution) -> None:
        self.counters["windows"] += 1
        if resolution.nonfinite:
            self.counters["skipped_windows"] += 1
            for language in {language for language, _ in resolution.nonfinite}:
                self.counters[f"nonfinite.{language}"] += 1
            if self.exchange.rank == 0:
                found = "; ".join(f"language {language} in {bucket}" for language, bucket in resolution.nonfinite)
                logger.warning("window %d: rows that are not finite, step skipped: %s", self.windows, found)
        self.windows += 1
        self.last = resolution
        self.window.clear()
        self._store.clear()
        self._contributions.clear()
        self._reset_results()

    def _reset_results(self) -> None:
        blocks, languages = len(self.plan.blocks), len(self.config.languages)
        self._grams: dict[int, Tensor] = {}
        self._resolved: set[int] = set()
        self._nonfinite: list[tuple[str, str]] = []
        self._block_gram = torch.zeros(blocks, languages, languages, dtype=torch.float64)
        self._block_weights = torch.zeros(blocks, languages, dtype=torch.float64)

    def _check_languages(self, slots: list[Slot]) -> None:
        rank = self.window.changed_language(slots)
        if rank is not None:
            first, now = self.window.table[0][rank].language, slots[rank].language
            languages = self.config.languages
            raise LanguageError(
                f'rank {rank} went from language "{languages[first]}" to "{languages[now]}" within a window, but '
                "gradients are exchanged only at the boundary and would be mixed: keep one language a rank and window "
                '(LanguageBatchSampler(affinity="window")), or exchange them in every micro-step (without '
                "once_a_window, no_sync)"
            )

    def _check_nodes(self) -> None:
        """Where nodes cannot train on one language each: an error if that was asked for, else a warning, once."""
        if not self._goes_by_node or self._merged(self.window.table[-1]) is not None:
            return
        advice = (
            f"ranks of one node trained on different languages, so that about {self.exchange.ranks_per_node} times the "
            "bytes go between nodes: lay languages out by node (LanguageBatchSampler(ranks_per_node="
            f"{self.exchange.ranks_per_node}); bucketmoo plan shows how)"
        )
        if self.config.exchange == "two_stage":
            raise LanguageError(f'{SECTION}.exchange = "two_stage": {advice}, or use "auto"')
        self.counters["flat_micro_steps"] += 1
        if self.exchange.rank == 0 and self.counters["flat_micro_steps"] == 1:
            logger.warning("window %d: %s", self.windows, advice)

    def _check_complete(self, done: Container[int]) -> None:
        missing = [bucket.name for index, bucket in enumerate(self.plan.buckets) if index not in done]
        if missing:
            total = len(self.plan.buckets)
            raise BucketMOOError(f"{len(missing)} of {total} buckets were not resolved, first {missing[0]}")

    def _shard_segments(self, bucket: int) -> Segments:
        numel = self.exchange.shard_numel(self.plan.buckets[bucket].numel)
        return self.plan.segments(bucket, self.exchange.rank * numel, (self.exchange.rank + 1) * numel)

    def _generator(self) -> torch.Generator:
        seed = digest(struct.pack("<qq", self.config.seed, self.windows))
        return torch.Generator().manual_seed(seed & (2**63 - 1))
