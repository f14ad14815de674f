"""What the adapters of torch's own wrappers share: languages, micro-steps and windows of a model that the user trains.

DeepSpeed has an engine that knows when a backward begins and a window ends. Here hooks find out: a forward pre-hook
takes the language off the batch, a hook on the outputs' gradients opens the micro-step as backward begins, and an
autograd callback closes it, still inside backward, once the wrapper has done its own part.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from bucketmoo_ds.batch import LanguageTracker
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.engine import BucketMOO, Resolution
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.logs import logger, show_by_default


class Adapter:
    """What a session asks of the adapter of one wrapper."""

    def begin(self, factor: float, boundary: bool) -> None:
        """A micro-step begins: the latest gradient counts `factor` times where gradients are added up locally."""
        raise NotImplementedError

    def end(self) -> list[bool]:
        """All gradients of the micro-step have come. Hands the engine what is left of them; returns for each parameter
        of the plan whether it had one."""
        raise NotImplementedError

    def write(self) -> None:
        """The window is resolved: the rest of the combined gradients goes where the optimizer looks for it."""
        raise NotImplementedError


class Session:
    """A model whose gradients are resolved, window by window. Made by the `register` of an adapter.

    Args:
        model: the wrapped model that the user calls.
        config: the settings.
        moo: the pipeline.
        adapter: the wrapper's.
        on_nonfinite: what becomes of a window in which a row was not finite. `drop`: all gradients are set to `None`,
            so that optimizers leave the parameters and their own state as they are. `keep`: they become NaN, which
            `torch.amp.GradScaler` looks for.
    """

    def __init__(
        self, model: nn.Module, config: BucketMOOConfig, moo: BucketMOO, adapter: Adapter, on_nonfinite: str
    ) -> None:
        self.moo = moo
        self._model = model
        self._adapter = adapter
        self._drop = on_nonfinite == "drop"
        self._tracker = LanguageTracker(config)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._open = False
        self._finished = False
        self._factor = 1.0
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after_forward),
            register_optimizer_step_pre_hook(_weak(self._before_optimizer_step)),
        ]
        show_by_default()
        if moo.exchange.rank == 0:
            logger.info(moo.describe())

    def language(self, language: object, target_tokens: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Sets the language of the forward passes inside the `with` block.

        Args:
            language: a name of `languages`, or its index.
            target_tokens: tokens that the loss is a mean over; counted from `labels` where left out.
        """
        return self._tracker.language(language, target_tokens)

    @property
    def last(self) -> Resolution | None:
        """What was decided in the latest window."""
        return self.moo.last

    @property
    def skipped(self) -> bool:
        """Whether the latest window had a row that was not finite."""
        return self.moo.last is not None and bool(self.moo.last.nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain JSON values; save it with the model and the optimizer.

        Raises:
            BucketMOOError: in the middle of a window, whose gradients would be lost.
        """
        if self.moo.in_window:
            raise BucketMOOError(
                "state_dict in the middle of a window would lose the gradients of its languages; save after "
                "optimizer.step() at the boundary"
            )
        return self.moo.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: the state is of another model or granularity.
        """
        self.moo.load_state_dict(state)

    def close(self) -> None:
        """Takes the hooks off again. The wrapper keeps its communication hook."""
        for handle in self._handles:
            handle.remove()

    # --- hooks --------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs, entries = self._tracker.strip(args, kwargs)
        if torch.is_grad_enabled():
            self._tracker.note(entries, module.training)
        return args, kwargs

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._before_backward)

    @torch.compiler.disable
    def _before_backward(self, gradient: Tensor) -> Tensor | None:
        if not self._open:
            self._begin()
        return None if self._factor == 1.0 else gradient * self._factor

    def _begin(self) -> None:
        if self._finished and any(parameter.grad is not None for parameter in self._parameters):
            raise BucketMOOError(
                "backward after the boundary of a window: call optimizer.step() and optimizer.zero_grad() first, or "
                f"register with micro_steps greater than {self.moo.micro_steps}"
            )
        self._finished = False
        moo = self.moo
        boundary = len(moo.window.table) + 1 == moo.micro_steps
        moo.begin_micro_step(self._tracker.slot(moo.micro_steps, moo.exchange.world_size), boundary)
        self._open, self._boundary = True, boundary
        self._factor = moo.window.local_factor(moo.exchange.rank) if moo.window.local else 1.0
        self._adapter.begin(self._factor, boundary)
        # Behind the wrapper's own callback, which it queued when the gradient reached it: before this hook.
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._open, self._factor = False, 1.0
        self.moo.end_micro_step(self._adapter.end())
        if self._boundary:
            self.moo.finish()
            self._adapter.write()
            self._finished = True
            if self.skipped:
                self._spoil()

    def _spoil(self) -> None:
        for parameter in self._parameters:
            if self._drop:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill_(float("nan"))

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        own = {id(parameter) for parameter in self._parameters}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        if self.moo.in_window:
            done = len(self.moo.window.table)
            raise BucketMOOError(
                f"optimizer.step() after {done} of {self.moo.micro_steps} micro-steps: this window is not resolved "
                "yet, and its gradients are no gradients. Register with the micro_steps that the training loop takes, "
                "and leave out an incomplete last window (LanguageBatchSampler emits whole windows only)"
            )
        self._finished = False


def _weak(method: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
    """A global hook that does not keep a session alive."""
    reference = weakref.WeakMethod(method)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(optimizer)

    return hook
