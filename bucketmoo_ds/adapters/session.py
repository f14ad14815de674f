"""What the adapters of torch's own wrappers share: languages, micro-steps and windows of a model that the user trains.

DeepSpeed has an engine that knows when a backward begins and a window ends. Here hooks find out: a forward pre-hook
takes the language off the batch, a hook on the outputs' gradients opens the micro-step as backward begins, and an
autograd callback closes it, still inside backward, once the wrapper has done its own part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data import switched_on
from bucketmoo_ds.data.batch import LanguageTracker
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.logs import logger, show_by_default
from bucketmoo_ds.pipeline.engine import BucketMOO, Resolution


class Adapter:
    """What a session asks of the adapter of one wrapper.

    Attributes:
        is_open: whether a micro-step has begun and not ended; the session sets it.
    """

    is_open = False

    def check_open(self) -> None:
        """Stops a backward that no output of the model opened.

        Raises:
            BucketMOOError: no micro-step has begun.
        """
        if not self.is_open:
            raise BucketMOOError(
                "a gradient came in a backward that did not pass through the model's outputs first: call the model "
                "that was registered, return tensors (or lists, tuples, dictionaries and dataclasses of them) from its "
                "forward, start backward at a loss made of them, and do not close the session"
            )

    def obstacle(self, boundary: bool) -> LanguageError | None:
        """What keeps this micro-step from being exchanged, if this rank knows of anything; every rank then raises."""
        return None

    def optimized(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The trainable parameters as the optimizer sees them now, which at register were these."""
        return parameters

    def holds_gradients(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the gradients of the window before are still there as backward begins."""
        return any(parameter.grad is not None for parameter in parameters)

    def after_backward(self, callback: Callable[[], None]) -> None:
        """Queues a callback of this backward behind the wrapper's own. Here it has queued that already, when the
        gradient reached it: before the hook on the outputs that calls this."""
        queue_callback(callback)

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

    def close(self) -> None:
        """Takes off the hooks that can be."""


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

    Raises:
        ConfigError: an argument of `register` is out of range, or `enabled` is off.
        DisagreementError: on every rank, if their settings, models or wrappers differ.
    """

    def __init__(
        self, model: nn.Module, config: BucketMOOConfig, moo: BucketMOO, adapter: Adapter, on_nonfinite: str
    ) -> None:
        _check(config, moo.micro_steps, on_nonfinite)
        moo.check_ranks()
        self.moo = moo
        self._adapter = adapter
        self._drop = on_nonfinite == "drop"
        self._tracker = LanguageTracker(config)
        self._registered = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._finished = False
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after_forward),
            register_optimizer_step_pre_hook(_weak(self._before_optimizer_step)),
        ]
        switched_on.note(self)
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
        self._adapter.close()

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
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        if self.moo.window.local:
            return _map_tensors(self._with_scaled_gradient, output)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._open)
        return output

    def _with_scaled_gradient(self, output: Tensor) -> Tensor:
        """Where gradients are scaled, a hook will not do: it would scale that of the logits a second time, of which the
        model has made the loss that it returns with them. What the user gets are ends of their own."""
        scaled: Tensor = _Scaled.apply(output, self._scale) if output.requires_grad else output
        return scaled

    @torch.compiler.disable
    def _open(self, gradient: Tensor) -> None:
        if not self._adapter.is_open:
            self._begin()

    def _scale(self, gradient: Tensor) -> Tensor:
        self._open(gradient)
        # Without a target token the loss may be 0/0.
        return gradient * self._factor if self._factor else torch.zeros_like(gradient)

    def _begin(self) -> None:
        if self._finished and self._adapter.holds_gradients(self._parameters):
            raise BucketMOOError(
                "backward after the boundary of a window: call optimizer.step() and optimizer.zero_grad() first, or "
                f"register with micro_steps greater than {self.moo.micro_steps}"
            )
        self._finished = False
        moo = self.moo
        boundary = len(moo.window.table) + 1 == moo.micro_steps
        slot = self._adapter.obstacle(boundary) or self._tracker.slot(moo.micro_steps, moo.exchange.world_size)
        moo.begin_micro_step(slot, boundary)
        self._boundary = boundary
        self._factor = moo.window.local_factor(moo.exchange.rank) if moo.window.local else 1.0
        self._adapter.begin(self._factor, boundary)
        self._adapter.is_open = True
        self._adapter.after_backward(self._end)

    def _end(self) -> None:
        self._adapter.is_open = False
        self.moo.end_micro_step(self._adapter.end())
        if self._boundary:
            self.moo.finish()
            self._adapter.write()
            self._finished = True
            if self.skipped:
                self._spoil()

    @property
    def _parameters(self) -> Sequence[Tensor]:
        return self._adapter.optimized(self._registered)

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


class _Scaled(torch.autograd.Function):
    """The identity, and what `scale` does to its gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.scale(gradients[0]), None


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif _is_dataclass(leaf):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name))


def _map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    def at_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if _is_dataclass(leaf):
            fields = [field.name for field in dataclasses.fields(leaf) if field.init]
            return dataclasses.replace(leaf, **{name: _map_tensors(function, getattr(leaf, name)) for name in fields})
        return leaf

    return pytree.tree_map(at_leaf, output)


def _is_dataclass(leaf: Any) -> bool:
    """Dataclasses are leaves to pytree, unless they are registered."""
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _check(config: BucketMOOConfig, micro_steps: object, on_nonfinite: str) -> None:
    if not config.enabled:
        raise ConfigError(f"{SECTION}.enabled = false: register changes the wrapper; leave the call out")
    if isinstance(micro_steps, bool) or not isinstance(micro_steps, int) or micro_steps < 1:
        raise ConfigError(f"micro_steps = {micro_steps!r}: expected a whole number, 1 or more")
    if on_nonfinite not in ("drop", "keep"):
        raise ConfigError(f'on_nonfinite = {on_nonfinite!r}: expected "drop" or "keep"')


def queue_callback(callback: Callable[[], None]) -> None:
    """Queues a callback for the end of the backward that is running."""
    Variable._execution_engine.queue_callback(callback)


def _weak(method: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
    """A global hook that does not keep a session alive."""
    reference = weakref.WeakMethod(method)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(optimizer)

    return hook
