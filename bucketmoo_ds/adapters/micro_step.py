"""One life of a micro-step, kept once for every adapter.

    closed -> open      the first gradient of this model's parameters comes in a backward
    open   -> closed    that backward has ended; the boundary's resolves the window. One that an error has stopped
                        stays open until the window is given up
    resolved            the gradients that the optimizer sees are those of a resolved window
    unused              and no optimizer step has used them yet

Who opens and closes differs from framework to framework; what that means does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from bucketmoo_ds.data.batch import LanguageTracker, Slot
from bucketmoo_ds.errors import BucketMOOError, LanguageError
from bucketmoo_ds.pipeline.engine import BucketMOO


class MicroStep:
    """Where a run stands in its window.

    Args:
        moo: the pipeline, which keeps the slots.
        tracker: knows the language of the forward passes that a backward belongs to.

    Attributes:
        is_open: whether a backward is bringing gradients.
        boundary: whether the present (or latest) micro-step ends the window.
        resolved: whether what the optimizer sees is a resolved window's, or nothing.
        unused: whether no step has used it yet.
        slot: this rank's slot of the present (or latest) micro-step.
    """

    slot = Slot(0, 0, 0.0)

    def __init__(self, moo: BucketMOO, tracker: LanguageTracker) -> None:
        self.moo = moo
        self.tracker = tracker
        self.is_open = self.boundary = self.resolved = self.unused = False

    def come(self) -> None:
        """The first gradient of a backward is there, so that what the optimizer sees is no resolved window's any more.
        A micro-step that is then refused stays open: an error that is caught leaves half of one."""
        self.is_open, self.resolved, self.unused = True, False, False

    def open(self, boundary: bool, obstacle: LanguageError | None = None) -> None:
        """Agrees with the other ranks on the languages of the micro-step that has come.

        Args:
            boundary: whether it ends the window.
            obstacle: why this rank cannot take it; every rank then raises.

        Raises:
            LanguageError: on every rank, if one of them has no valid micro-batch.
            DisagreementError: on every rank, if their positions, plans or settings differ.
            BucketMOOError: on every rank, if the window has more than M micro-steps.
        """
        moo = self.moo
        moo.begin_micro_step(obstacle or self.tracker.slot(moo.micro_steps, moo.exchange.world_size), boundary)
        self.boundary = boundary
        self.slot = moo.window.latest[moo.exchange.rank]
        taken = moo.window.micro_steps
        if taken >= moo.micro_steps and not boundary:
            raise BucketMOOError(
                f"micro-step {taken} of {moo.micro_steps} does not end its window: set gradient_accumulation_steps to "
                "as many as there are between two optimizer steps (no_sync() and set_gradient_accumulation_boundary() "
                "do not tell)"
            )

    def close(self, contributed: Sequence[bool] | None = None) -> None:
        """The backward has ended.

        Args:
            contributed: for each parameter of the plan, whether this rank had a gradient for it; left out where it
                adds up further micro-steps before it hands anything over.
        """
        self.is_open = False
        if contributed is not None:
            self.moo.end_micro_step(contributed)

    def resolve(self, gradient_scale: float = 1.0) -> None:
        """Resolves the window. See `BucketMOO.finish`."""
        self.moo.finish(gradient_scale)
        self.resolved = self.unused = True

    def use(self) -> None:
        """An optimizer step uses what was resolved, or it is given up."""
        self.unused = False

    def abandon(self) -> None:
        """Gives up what the window has so far: an error has interrupted it. All ranks have to do it."""
        self.moo.abandon()
        self.tracker.forget()
        self.is_open = self.resolved = self.unused = False

    def check_not_interrupted(self) -> None:
        """Raises `BucketMOOError` where a micro-step is still open as the next forward pass or a step begins."""
        if self.is_open:
            raise BucketMOOError(
                "the last backward did not come to its end, so that its window holds half a micro-step: after an error "
                "that you catch, call abandon() on every rank, clear the gradients, and begin the window anew"
            )

    def check_step(self) -> None:
        """Raises `BucketMOOError` where an optimizer step would find the window unfinished."""
        self.check_not_interrupted()
        if self.moo.in_window:
            raise BucketMOOError(
                f"optimizer.step() after {self.moo.window.micro_steps} of {self.moo.micro_steps} micro-steps: this "
                "window is not resolved yet, and its gradients are no gradients. Register with the micro_steps that "
                "the training loop takes, leave out an incomplete last window (LanguageBatchSampler emits whole "
                "windows only), and after an error that you catch call abandon()"
            )

    # --- what follows from the slots ----------------------------------------------------------------------------

    @property
    def first(self) -> bool:
        """Whether the present micro-step is its window's first."""
        return self.moo.window.micro_steps == 1

    @property
    def exchanges(self) -> bool:
        """Whether the present micro-step's gradients go to the other ranks."""
        return self.boundary or not self.moo.window.once_a_window

    @property
    def factor(self) -> float:
        """What this rank's gradients are multiplied by before it adds them up; 0 where they are no numbers."""
        return self.moo.window.own_factor(self.moo.exchange.rank) if self.moo.window.once_a_window else 1.0

    @property
    def skipped(self) -> bool:
        """Whether the latest window had a row that was not finite."""
        return self.moo.last is not None and bool(self.moo.last.nonfinite)
