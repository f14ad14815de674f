"""What stands between DeepSpeed and the pipeline: windows, which all stages of ZeRO have alike; and for ZeRO's own
optimizers staging in front of the pipeline, the optimizer's partitions behind it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters.staging import Staging
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import BlockPlan
from bucketmoo_ds.plan.layout import Layout

if TYPE_CHECKING:
    from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine


class StageReduction:
    """What an engine asks of the reduction of its stage: a backward opens a micro-step, a step closes the window.

    Attributes:
        moo: the pipeline.
        finished: whether the window is resolved, and no step has used it yet.
    """

    moo: BucketMOO
    finished: bool
    _engine: BucketMOOEngine

    def begin_micro_step(self, boundary: bool) -> None:
        """Backward begins; further calls in the same one do nothing.

        Args:
            boundary: whether this micro-step ends the window.
        """
        raise NotImplementedError

    def close_local_micro_step(self) -> None:
        """Backward has ended; where a rank adds up its micro-steps, nothing else has said so."""

    def start_window(self) -> None:
        """What was resolved is used, or given up."""
        self.finished = False

    @property
    def skip(self) -> bool:
        """Whether the window that is closed now holds a row that is not finite."""
        return self.moo.last is not None and bool(self.moo.last.nonfinite)

    def check_finished(self) -> None:
        """Stops a step whose gradients took another way."""
        if not self.finished:
            raise BucketMOOError(
                "optimizer step without a resolved window: the gradients of this window did not pass through "
                "bucket_moo (call engine.backward and engine.step of the engine that deepspeed.initialize returned)"
            )

    def _agree(self, boundary: bool) -> None:
        """Agrees with the other ranks on this micro-step's languages."""
        if self.finished:
            raise BucketMOOError("backward after the boundary of a window: call engine.step() first")
        moo = self.moo
        moo.begin_micro_step(self._engine.language_tracker.slot(moo.micro_steps, moo.exchange.world_size), boundary)
        taken = len(moo.window.table)
        if taken >= moo.micro_steps and not boundary:
            raise BucketMOOError(
                f"micro-step {taken} of {moo.micro_steps} does not end its window: set gradient_accumulation_steps to "
                "as many as there are between two optimizer steps (no_sync() and set_gradient_accumulation_boundary() "
                "do not tell)"
            )


class Reduction(StageReduction):
    """Takes gradients from a ZeRO optimizer's hooks; a stage's subclass brings combined shards to its partitions.

    Args:
        engine: the DeepSpeed engine, which knows the languages.
        optimizer: its optimizer.
        plan, exchange: as in `BucketMOO`.
        layout: of the buckets in the exchange.
        index: for the `id` of each parameter its index in the plan.
        local: whether each rank adds up the micro-steps of a window, each language apart, before they are exchanged.
        device: where gradients are.
    """

    def __init__(
        self,
        engine: BucketMOOEngine,
        optimizer: Any,
        plan: BlockPlan,
        exchange: Exchange,
        layout: Layout,
        index: dict[int, int],
        local: bool,
        device: torch.device,
    ) -> None:
        self.moo = BucketMOO(
            engine.moo_config,
            plan,
            exchange,
            self.deliver,
            micro_steps=engine.gradient_accumulation_steps(),
            local=local,
            apart=local,
            segments=[layout.segments(bucket, exchange.rank) for bucket in range(len(plan.buckets))],
            result_dtype=optimizer.gradient_accumulation_dtype,
            overlap=bool(engine.zero_overlap_comm()),
            device=device,
        )
        # What is added up here is added up in the dtype that the user chose for that.
        self._wire_dtype = optimizer.communication_data_type
        staging_dtype = optimizer.gradient_accumulation_dtype if local else self._wire_dtype
        self._make_staging = functools.partial(
            Staging, plan, layout, exchange.world_size, staging_dtype, device, self._ingest
        )
        self._staging = self._make_staging()
        self._sums: dict[int, Staging] = {}  # by language, where micro-steps are added up
        self._part = 0
        self._index = index
        self._engine = engine
        self._optimizer = optimizer
        self.start_window()

    def deliver(self, bucket: int, shard: Tensor) -> None:
        """The engine's sink: takes a combined shard to where the optimizer looks for it, or starts to."""
        raise NotImplementedError

    def start_window(self) -> None:
        """See `StageReduction`."""
        super().start_window()
        self._open = False
        self._staging.start_window()
        self._sums.clear()

    def begin_micro_step(self, boundary: bool) -> None:
        """See `StageReduction`."""
        if self._open:
            return
        self._agree(boundary)
        self._open = True
        window, rank = self.moo.window, self.moo.exchange.rank
        language, self._counts = window.table[-1][rank].language, window.table[-1][rank].target_tokens > 0
        self._boundary = boundary
        if window.local:
            self._factor = window.local_factor(rank)
            self._leaves = boundary and window.parts == 1 and window.languages_of(rank) in ([], [language])
            if language not in self._sums:
                self._sums[language] = self._make_staging()
            self._staging = self._sums[language]
            self._staging.start_micro_step()
        else:
            self._factor, self._leaves = 1.0, True
            self._staging.start_window()

    def add(self, param: Tensor, gradient: Tensor) -> None:
        """Takes the gradient of one parameter; of a micro-batch without a target token it is no number."""
        self.begin_micro_step(self._engine.at_boundary())
        if not self._counts:
            gradient = torch.zeros_like(gradient)
        self._staging.add(self._index[id(param)], gradient, self._factor)
        if self._leaves:
            self._staging.release_complete()

    def end_micro_step(self) -> None:
        """Exchanges what is left of the micro-step; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        stagings = list(self._sums.values()) or [self._staging]
        contributed = [any(of_parameter) for of_parameter in zip(*(each.contributed for each in stagings), strict=True)]
        if self._leaves:
            self._staging.release_all()
        elif self._boundary:
            self._release_parts()
        self.moo.end_micro_step(contributed)

    def _release_parts(self) -> None:
        """Exchanges one language after the other; a rank that has fewer of them than others goes on with zeros."""
        window = self.moo.window
        languages = window.languages_of(self.moo.exchange.rank)
        for self._part in range(window.parts):
            mine = self._part < len(languages)
            staging = self._sums[languages[self._part]] if mine else self._make_staging()
            staging.start_micro_step()
            staging.release_all()
        self._part = 0

    def close_local_micro_step(self) -> None:
        """See `StageReduction`. ZeRO-1 before the boundary: the next backward is another micro-step."""
        if self.moo.window.local and not self._boundary:
            self._open = False

    def finish(self) -> None:
        """Resolves the window."""
        self.moo.finish(float(self._optimizer.loss_scale))
        self.finished = True

    def _ingest(self, bucket: int, flat: Tensor) -> None:
        self.moo.ingest(bucket, flat.to(self._wire_dtype), self._part)
