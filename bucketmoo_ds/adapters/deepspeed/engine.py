"""DeepSpeed's engine with a language for every micro-batch, and our state in its checkpoints.

Read in DeepSpeed 0.18.4 to 0.19.8, `runtime/engine.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from bucketmoo_ds.adapters.deepspeed.reduction import StageReduction
from bucketmoo_ds.adapters.hooks import after_backward, graph_task, watch
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import LanguageTracker, Passage, Slot
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.pipeline import checkpoint
from bucketmoo_ds.pipeline.engine import BucketMOO


class CarefulCheckpointEngine:
    """DeepSpeed's checkpoint engine. What it could not write is kept until all ranks are through: in between, the
    others wait for this one in barriers.

    Attributes:
        problem: the first file that could not be written, and why; empty for none.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.problem = ""

    def save(self, state_dict: Any, path: str) -> Any:
        """Writes a file."""
        try:
            return self._engine.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.problem = self.problem or f"{path}: {why_not_written(Path(path), error)}"
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def why_not_written(path: Path, error: Exception) -> str:
    """Returns the operating system's reason where it has one, such as a full disk, of which torch's writer only says
    `unexpected pos`: what it has left of `path` still fills the disk, so that a small file beside it fails likewise."""
    if isinstance(error, OSError):
        return str(error)
    probe = path.with_name(f".{path.name}.probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return f"{reason.strerror} ({error})"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return str(error)


class BucketMOOEngine(DeepSpeedEngine):
    """See the module. Made from a `DeepSpeedEngine` by `attach`."""

    moo_config: BucketMOOConfig
    language_tracker: LanguageTracker
    reduction: StageReduction
    checkpoint_engine: Any

    @property
    def moo(self) -> BucketMOO:
        """The pipeline: `engine.moo.last` is the latest window's resolution, `engine.moo.counters` what was skipped."""
        return self.reduction.moo

    @property
    def slot(self) -> Slot:
        """What this rank has trained on in the latest micro-step."""
        return self.reduction.micro.slot

    def language(
        self, language: object, target_tokens: int | None = None, loss_divisor: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Sets the language of the forward passes inside the `with` block.

        Args:
            language: a name of `bucket_moo.languages`, or its index.
            target_tokens: tokens that the loss is taken over; counted from `labels` where left out.
            loss_divisor: where the loss is not their mean: what the sum over them has been divided by when its
                gradients come, what the framework divides by included.
        """
        return self.language_tracker.language(language, target_tokens, loss_divisor)

    def tell_loss(self, loss: torch.Tensor | float) -> None:
        """Tells the mean loss per target token of the backward that comes, where `normalize` or the rule asks for
        losses and the model does not return them."""
        self.language_tracker.tell_loss(loss)

    def register_state(self, name: str, owner: checkpoint.Stateful) -> None:
        """Saves and restores something of the run, such as its sampler, with every checkpoint.

        Args:
            owner: has `state_dict()`, which gives plain JSON values, and `load_state_dict(state)`.
        """
        self._moo_states[name] = owner

    def at_boundary(self) -> bool:
        """Whether this micro-step ends the window."""
        return bool(self.is_gradient_accumulation_boundary()) and not self.inside_no_sync_ctxt

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's forward pass, without our entries of the batch."""
        inputs, kwargs, entries = self.language_tracker.strip(inputs, kwargs)
        if not torch.is_grad_enabled() or graph_task() is not None:  # or a recomputation
            return super().forward(*inputs, **kwargs)
        self.reduction.micro.check_not_interrupted()
        output = super().forward(*inputs, **kwargs)
        # The engine's own `training` never changes: `DeepSpeedEngine.eval` sets the module's.
        passage = self.language_tracker.note(entries, self.module.training, output)
        watch(output, lambda: self._reached(passage))
        return output

    def _reached(self, passage: Passage) -> None:
        """A backward comes to what a forward pass has returned; if it brings no gradient, it was none of ours."""
        self.language_tracker.bring_back(passage)
        after_backward(lambda: self.language_tracker.set_aside(passage))

    def _backward_prologue(self) -> None:
        super()._backward_prologue()
        self.reduction.due = True

    def _backward_epilogue(self) -> None:
        super()._backward_epilogue()
        self.reduction.end_unexchanged_micro_step()

    def zero_grad(self) -> None:
        """DeepSpeed's `zero_grad`. A window that is resolved is given up, and the next backward begins another."""
        super().zero_grad()
        self.reduction.micro.use()

    def abandon(self) -> None:
        """Gives up the window under way, or the resolved one that no step has used: the next backward begins a new one.

        To be called on all ranks, after an error that was caught. Clears the gradients.
        """
        self.reduction.abandon()
        self.zero_grad()
        self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()
        if isinstance(self.optimizer, ZeROOptimizer):  # the interrupted backward has not left it
            if hasattr(self.optimizer, "clear_backward_seen_flag"):
                self.optimizer.clear_backward_seen_flag()
            self.optimizer._backward_active_depth = 0

    @contextlib.contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Refused: it adds up the gradients of several backwards before anything is exchanged."""
        raise BucketMOOError(
            "engine.coalesce_grad_reduction() adds up gradients of several languages before they are exchanged; with "
            "bucket_moo use gradient_accumulation_steps"
        )
        yield

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """DeepSpeed's checkpoint, with `bucket_moo.json` in the same folder.

        Ours is written first, and `latest` last, when all ranks have written their parts: a checkpoint that `latest`
        names is whole. (DeepSpeed's own rank 0 names it as soon as its part is there.)

        Raises:
            BucketMOOError: in the middle of a window, or (on every rank) where a rank could not write.
        """
        if self.moo.in_window:
            raise BucketMOOError(
                "save_checkpoint in the middle of a gradient accumulation window would lose the gradients of its "
                "languages; save after engine.step() at the boundary"
            )
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"
        states = {"moo": self.moo.state_dict()} | {name: owner.state_dict() for name, owner in self._moo_states.items()}
        exchange = self.moo.exchange
        checkpoint.save(Path(save_dir) / tag, self.moo_config, self.moo.plan, states, exchange)
        theirs, careful = self.checkpoint_engine, CarefulCheckpointEngine(self.checkpoint_engine)
        later = theirs.is_decoupled()  # then it is written in the background, and named when it is there
        self.checkpoint_engine = careful
        try:
            saved = super().save_checkpoint(
                save_dir, tag, client_state or {}, save_latest and later, exclude_frozen_parameters
            )
        finally:
            self.checkpoint_engine = theirs
        checkpoint.check_saved(careful.problem, exchange)
        if save_latest and not later:
            checkpoint.name_latest(Path(save_dir), tag, exchange)
        return saved

    def load_checkpoint(self, load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's `load_checkpoint`, and our state where the checkpoint has one.

        From a universal checkpoint, which may be of another world size, the pipeline's state is restored and what
        `register_state` added is not: a sampler's position is one among other ranks.

        Raises:
            ConfigError: our state is of other languages or blocks, or lacks something that was registered.
        """
        path, client_state = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        if path is None:
            return path, client_state
        owners = {"moo": self.moo, **self._moo_states}
        universal = self.load_universal_checkpoint()
        checkpoint.restore(path, self.moo_config, owners, self.moo.exchange, universal=universal)
        return path, client_state
