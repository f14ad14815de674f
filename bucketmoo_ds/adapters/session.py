"""What the adapters of torch's own wrappers share: languages, micro-steps and windows of a model that the user trains.

DeepSpeed has an engine that knows when a backward begins and a window ends. Here hooks find out: a forward pre-hook
takes the language off the batch, the first gradient of the model's parameters opens the micro-step, and an autograd
callback closes it, still inside backward, once the wrapper has done its own part. A backward that brings the parameters
no gradient (`torch.autograd.grad`, another model's) opens nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bucketmoo_ds.adapters.hooks import Hook, Stays, after_backward, graph_task, watch, weak
from bucketmoo_ds.adapters.micro_step import MicroStep
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data import switched_on
from bucketmoo_ds.data.batch import LanguageTracker, Passage, Slot
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.logs import logger, show_by_default
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.pipeline.resolution import Resolution


class Adapter(Stays):
    """What a session asks of the adapter of one wrapper.

    Attributes:
        moo: the pipeline.
        arrive: to be called when a gradient comes, before anything is done with it; the session sets it, and the next
            two.
        settle: to be called where what comes of a micro-step has to be there before backward is over.
        spoil: to be called then, when `.grad` is made.
    """

    moo: BucketMOO
    arrive: Callable[[], None]
    settle: Callable[[], None]
    spoil: Callable[[], None]

    def bind(self, micro: MicroStep) -> None:
        """Is told where the run stands: once, by whoever drives the adapter."""
        self.micro = micro

    def before_forward(self) -> None:
        """A forward pass begins that a backward may follow."""

    def obstacle(self, boundary: bool) -> LanguageError | None:
        """What keeps this micro-step from being exchanged, if this rank knows of anything; every rank then raises."""
        return None

    def optimized(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The trainable parameters as the optimizer sees them now, which at register were these."""
        return parameters

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that these parameters hold now."""
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def nothing_came(self) -> None:
        """A backward has ended that went through the model and brought its parameters no gradient."""

    def begin(self) -> None:
        """A micro-step begins. What `.grad` held before a window is no part of it."""
        raise NotImplementedError

    def end(self) -> list[bool]:
        """All gradients of the micro-step have come. Hands the engine what is left of them; returns for each parameter
        of the plan whether it had one."""
        raise NotImplementedError

    def write(self) -> None:
        """The window is resolved: the rest of the combined gradients goes where the optimizer looks for it."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Forgets what it has of the window."""
        raise NotImplementedError

    def close(self) -> None:
        """Takes off the hooks that can be."""


class Session(Stays):
    """A model whose gradients are resolved, window by window. Made by the `register` of an adapter.

    Args:
        model: the wrapped model that the user calls.
        config: the settings.
        adapter: the wrapper's.
        on_nonfinite: what becomes of a window in which a row was not finite. `drop`: all gradients are set to `None`,
            so that optimizers leave the parameters and their own state as they are. `keep`: they become NaN, which
            `torch.amp.GradScaler` looks for.

    Raises:
        ConfigError: an argument of `register` is out of range, or `enabled` is off.
        DisagreementError: on every rank, if their settings, models or wrappers differ.
    """

    def __init__(self, model: nn.Module, config: BucketMOOConfig, adapter: Adapter, on_nonfinite: str) -> None:
        moo = adapter.moo
        _check(config, moo.micro_steps, on_nonfinite)
        moo.check_ranks()
        self.moo = moo
        self._tracker = LanguageTracker(config, model)
        self._micro = MicroStep(moo, self._tracker)
        self._adapter = adapter
        adapter.bind(self._micro)
        self._drop = on_nonfinite == "drop"
        self._reaching: set[tuple[Passage, int | None]] = set()  # passes that the running backward has come to
        self._registered = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True, prepend=True),
            model.register_forward_hook(Hook(self._after_forward)),
            register_optimizer_step_pre_hook(weak(self._before_optimizer_step)),
        ]
        adapter.arrive, adapter.settle, adapter.spoil = self._arrive, self._settle, self._spoil
        switched_on.note(self)
        show_by_default()
        if moo.exchange.rank == 0:
            logger.info(moo.describe())

    def language(
        self, language: object, target_tokens: int | None = None, loss_divisor: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Sets the language of the forward passes inside the `with` block.

        Args:
            language: a name of `languages`, or its index.
            target_tokens: tokens that the loss is taken over; counted from `labels` where left out.
            loss_divisor: where the loss is not their mean: what the sum over them has been divided by when its
                gradients come, what the framework divides by included.
        """
        return self._tracker.language(language, target_tokens, loss_divisor)

    def tell_loss(self, loss: Tensor | float) -> None:
        """Tells the mean loss per target token of the backward that comes, where `normalize` or the rule asks for
        losses and the model does not return them."""
        self._tracker.tell_loss(loss)

    @property
    def last(self) -> Resolution | None:
        """What was decided in the latest window."""
        return self.moo.last

    @property
    def windows(self) -> int:
        """How many windows have been resolved."""
        return self.moo.windows

    @property
    def in_window(self) -> bool:
        """Whether micro-steps have been taken that no optimizer step has used yet."""
        return self.moo.in_window

    @property
    def counters(self) -> Mapping[str, int]:
        """What has been counted since the run began."""
        return self.moo.counters

    @property
    def slot(self) -> Slot:
        """What this rank has trained on in the latest micro-step."""
        return self._micro.slot

    @property
    def skipped(self) -> bool:
        """Whether the latest window had a row that was not finite."""
        return self._micro.skipped

    def abandon(self) -> None:
        """Gives up the window under way, or the resolved one that no step has used: the next backward begins a new one.

        To be called on all ranks, after an error that was caught. Clears the gradients.
        """
        self._micro.abandon()
        self._reaching.clear()
        self._adapter.abandon()
        for parameter in self._parameters:
            parameter.grad = None

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
        self._adapter.arrive = _closed

    # --- hooks --------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs, entries = self._tracker.strip(args, kwargs)
        self._entries = None
        if torch.is_grad_enabled() and graph_task() is None:  # not a recomputation
            while self._reaching:  # by a backward that an error has stopped
                self._tracker.set_aside(self._reaching.pop()[0])
            self._micro.check_not_interrupted()
            self._entries = entries
            self._adapter.before_forward()
        return args, kwargs

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._entries is not None:  # noted now, for one that ends in an error is none
            passage = self._tracker.note(self._entries, module.training, output)
            self._entries = None
            watch(output, lambda: self._reached(passage))

    def _reached(self, passage: Passage) -> None:
        """A backward comes to what a forward pass has returned: its end is known from here on, also where parts of it
        run as backwards of their own (reentrant checkpointing)."""
        task = graph_task()
        if (passage, task) in self._reaching:
            return
        if all(other != task for _, other in self._reaching):
            self._micro.check_not_interrupted()
        self._reaching.add((passage, task))
        self._tracker.bring_back(passage)
        after_backward(lambda: self._after_backward(passage, task))

    def _after_backward(self, passage: Passage, task: int | None) -> None:
        self._reaching.discard((passage, task))
        if self._micro.is_open:
            self._end()
        self._tracker.set_aside(passage)
        if not self._reaching:
            self._adapter.nothing_came()

    def _arrive(self) -> None:
        """A gradient comes: the first one opens the micro-step."""
        if self._micro.is_open:
            return
        unused = self._micro.unused
        self._micro.come()
        if unused:
            self._check_cleared()
        moo = self.moo
        boundary = moo.window.micro_steps + 1 == moo.micro_steps
        self._micro.open(boundary, self._adapter.obstacle(boundary))
        self._adapter.begin()
        if not self._reaching:  # what the model returns hides its tensors
            after_backward(self._end)

    def _end(self) -> None:
        if self._micro.is_open:
            self._settle()
            self._spoil()

    def _settle(self) -> None:
        if not self._micro.is_open:
            return
        self._micro.close(self._adapter.end())
        if self._micro.boundary:
            self._micro.resolve()
            self._adapter.write()

    @property
    def _parameters(self) -> Sequence[Tensor]:
        return self._adapter.optimized(self._registered)

    def _spoil(self) -> None:
        if not (self._micro.unused and self.skipped):
            return
        for parameter in self._parameters:
            if self._drop:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill_(float("nan"))

    def _check_cleared(self) -> None:
        """A resolved window that no step has used is given up where its gradients were cleared."""
        if self._holds_gradients(self._parameters):
            raise BucketMOOError(
                "backward after the boundary of a window: call optimizer.step() and optimizer.zero_grad() first, or "
                f"register with micro_steps greater than {self.moo.micro_steps}"
            )

    def _holds_gradients(self, parameters: Sequence[Tensor]) -> bool:
        """Whether any of these has a gradient that is not cleared, in whichever spelling. It asks the device, but is
        called only where gradients are there that should not be."""
        held = self._adapter.gradients(parameters)
        local = (each.to_local() if isinstance(each, DTensor) else each for each in held)
        return any(bool(each.count_nonzero()) for each in local)

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own = [parameter for parameter in self._parameters if id(parameter) in stepped]
        if not own:
            return
        self._micro.check_step()
        if not self._micro.resolved and self._holds_gradients(own):
            raise BucketMOOError(
                "optimizer.step() on gradients that no window has resolved: they took another way than the one that "
                "register has hooked. Call the model that was registered (not a module inside of it), name a language, "
                "and call backward before this step"
            )
        self._micro.use()


def unwrapped(model: nn.Module) -> Any:
    """Returns the module that `torch.compile` has wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def _closed() -> None:
    raise BucketMOOError(
        "a gradient came after the session was closed: the wrapper still has its communication hook, and nobody who "
        "names languages; wrap the model anew, or do not close the session"
    )


def _check(config: BucketMOOConfig, micro_steps: object, on_nonfinite: str) -> None:
    if not config.enabled:
        raise ConfigError(f"{SECTION}.enabled = false: register changes the wrapper; leave the call out")
    if isinstance(micro_steps, bool) or not isinstance(micro_steps, int) or micro_steps < 1:
        raise ConfigError(f"micro_steps = {micro_steps!r}: expected a whole number, 1 or more")
    if on_nonfinite not in ("drop", "keep"):
        raise ConfigError(f'on_nonfinite = {on_nonfinite!r}: expected "drop" or "keep"')
