"""What stands between DeepSpeed and the pipeline: micro-steps and windows, which all stages of ZeRO have alike; and for
ZeRO's own optimizers the gathering in front of the pipeline, the optimizer's partitions behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters.micro_step import MicroStep
from bucketmoo_ds.adapters.staging import Gathering
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import BlockPlan
from bucketmoo_ds.plan.layout import Layout

if TYPE_CHECKING:
    from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine


class StageReduction:
    """What an engine asks of the reduction of its stage: the first gradient of a backward opens a micro-step, the
    backward's end closes it, a step uses the window.

    Attributes:
        moo: the pipeline.
        micro: where the run stands.
        due: whether a backward has come to the engine's outputs, and to no parameter yet.
    """

    moo: BucketMOO
    micro: MicroStep
    due = False
    _engine: BucketMOOEngine

    def begin(self) -> None:
        """A micro-step begins. See `Adapter`."""
        raise NotImplementedError

    def end(self) -> list[bool]:
        """All gradients of a micro-step that is exchanged have come. See `Adapter`."""
        raise NotImplementedError

    def holds_gradients(self) -> bool:
        """Whether the gradients of a resolved window that no step has used are still there."""
        return True

    def arrive(self) -> None:
        """A gradient comes: the first one opens the micro-step."""
        if self.micro.is_open:
            return
        unused = self.micro.unused
        self.micro.come()
        if unused and self.holds_gradients():
            raise BucketMOOError("backward after the boundary of a window: call engine.step() first")
        self.due = False
        self.micro.open(self._engine.at_boundary())
        self.begin()

    def end_micro_step(self) -> bool:
        """Exchanges what is left of the micro-step, where it is exchanged; again, or after a backward that opened none,
        it does nothing.

        Returns:
            Whether the window can be resolved now.
        """
        self._open_if_due()
        if not (self.micro.is_open and self.micro.exchanges):
            return False
        self.micro.close(self.end())
        self.after_exchange()
        return self.micro.boundary

    def after_exchange(self) -> None:
        """The micro-step's gradients have gone to the other ranks."""

    def end_unexchanged_micro_step(self) -> None:
        """Backward has ended; where a rank adds up its micro-steps, nothing else has said so."""
        self._open_if_due()
        if self.micro.is_open and not self.micro.exchanges:
            self.micro.close()

    def abandon(self) -> None:
        """Forgets the window."""
        self.due = False
        self.micro.abandon()

    def check_step(self) -> None:
        """Stops a step whose gradients took another way."""
        if not (self.micro.resolved and self.micro.unused):
            raise BucketMOOError(
                "optimizer step without a resolved window: the gradients of this window did not pass through "
                "bucket_moo (call engine.backward and engine.step of the engine that deepspeed.initialize returned)"
            )

    def _open_if_due(self) -> None:
        """A backward of the engine that brought this rank's parameters no gradient is a micro-step all the same: the
        other ranks wait for it. (`torch.autograd.grad` is none, and the engine does not run it.)"""
        if self.due and self._engine._running_engine_backward:
            self.arrive()


class ZeroReduction(StageReduction):
    """Takes gradients from a ZeRO optimizer's hooks; a stage's subclass brings combined shards to its partitions.

    Args:
        engine: the DeepSpeed engine, which knows the languages.
        optimizer: its optimizer.
        plan, exchange: as in `BucketMOO`.
        layout: of the buckets in the exchange.
        index: for the `id` of each parameter its index in the plan.
        once_a_window: whether each rank adds up the micro-steps of a window, each language apart, until they are
            exchanged.
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
        once_a_window: bool,
        device: torch.device,
    ) -> None:
        self.moo = BucketMOO(
            engine.moo_config,
            plan,
            exchange,
            self.deliver,
            micro_steps=engine.gradient_accumulation_steps,
            once_a_window=once_a_window,
            apart=once_a_window,
            segments=[layout.segments(bucket, exchange.rank) for bucket in range(len(plan.buckets))],
            result_dtype=optimizer.gradient_accumulation_dtype,
            overlap=bool(engine.zero_overlap_comm()),
            device=device,
        )
        self.micro = MicroStep(self.moo, engine.language_tracker)
        # What is added up here is added up in the dtype that the user chose for that.
        wire = optimizer.communication_data_type
        added_up = optimizer.gradient_accumulation_dtype if once_a_window else wire
        self._gathering = Gathering(self.micro, layout, added_up, wire, device)
        self._index = index
        self._frozen = [(name, each) for name, each in engine.module.named_parameters() if not each.requires_grad]
        self._engine = engine
        self._optimizer = optimizer

    def deliver(self, bucket: int, shard: Tensor) -> None:
        """The engine's sink: takes a combined shard to where the optimizer looks for it, or starts to."""
        raise NotImplementedError

    def begin(self) -> None:
        """See `StageReduction`.

        Raises:
            BucketMOOError: a parameter is trained that DeepSpeed has not taken.
        """
        unfrozen = [name for name, each in self._frozen if each.requires_grad] if self.micro.first else []
        if unfrozen:
            raise BucketMOOError(
                f'parameter "{unfrozen[0]}" ({len(unfrozen)} in all) was unfrozen after the engine was made, which '
                "trains what was trainable then: make it with all of them trainable, and freeze and unfreeze later"
            )
        self._gathering.begin()

    def add(self, param: Tensor, gradient: Tensor) -> None:
        """Takes the gradient of one parameter."""
        self.arrive()
        self._gathering.add(self._index[id(param)], gradient)

    def end(self) -> list[bool]:
        """See `StageReduction`."""
        return self._gathering.end()

    def finish(self) -> None:
        """Resolves the window."""
        self.micro.resolve(float(self._optimizer.loss_scale))

    def abandon(self) -> None:
        """See `StageReduction`."""
        super().abandon()
        self._gathering.start_window()
