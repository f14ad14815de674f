"""A model whose micro-batches mix languages, resolved inside its own backward.

No communication hook: what a wrapper reduces is an ordinary gradient, weighted already (design: docs/theory.md). This
session knows which forward pass is which, opens a micro-step when a backward comes to what one has returned, and fills
the table of weights that the uses read; a window ends with the optimizer's step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bucketmoo_ds import ops
from bucketmoo_ds.adapters.hooks import Hook, Stays, after_backward, graph_task, tensors_of, watch, weak
from bucketmoo_ds.adapters.mixed import accounted, coverage, modules
from bucketmoo_ds.adapters.mixed.passes import Pass
from bucketmoo_ds.adapters.whole import BUCKET_BYTES
from bucketmoo_ds.comm.agreement import check_equal, digest, tell_ranks
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BY_LOSS, BucketMOOConfig
from bucketmoo_ds.data import switched_on
from bucketmoo_ds.data.batch import Passage
from bucketmoo_ds.data.row_tracker import MixedBatch, MixedSlot, RowTracker
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.logs import logger, show_by_default
from bucketmoo_ds.pipeline.checks import check_left_out
from bucketmoo_ds.pipeline.estimate import GramEstimate
from bucketmoo_ds.pipeline.memory import NO_MEMORY
from bucketmoo_ds.pipeline.mixed_window import MixedWindow
from bucketmoo_ds.pipeline.resolution import Record, Resolution
from bucketmoo_ds.plan.blocks import granularity_of, plan_blocks
from bucketmoo_ds.plan.choices import choose_gram_every, named, needs_losses
from bucketmoo_ds.transfer import ToHost, to_device

EVERY = 8  # windows from one Gram to the next, unless `gram_every` says otherwise


class MixedSession(Stays):
    """Made by `register`.

    Args:
        model: the model that the user calls, wrapped or not.
        covered: its trained parameters and their modules.
        config: the settings.
        exchange: the data-parallel ranks.
        micro_steps: tells M, the micro-steps that a loss is divided by, as the framework has it now.
        divisor: what the framework divides the sum of the ranks' gradients by.
        device: where gradients are.
        loss_scale: tells what losses are multiplied by.

    Raises:
        DisagreementError: on every rank, if their settings or models differ.
    """

    def __init__(
        self,
        model: nn.Module,
        covered: coverage.Coverage,
        config: BucketMOOConfig,
        exchange: Exchange,
        micro_steps: Callable[[], int],
        divisor: float,
        device: torch.device,
        loss_scale: Callable[[], float],
    ) -> None:
        self.config = config
        self.exchange = exchange
        # A bucket is a block of granularity `bucket` here, and nothing else.
        self.plan = plan_blocks(covered.parameters, BUCKET_BYTES // 4, granularity_of(config))
        self.record = Record(config, self.plan, speaks=exchange.rank == 0)
        self._model = model
        self._micro_steps = micro_steps
        self._divisor = divisor
        self._loss_scale = loss_scale
        self._covered = covered
        self._count = len(config.languages)
        self._place(device if device.type != "meta" else torch.device("cpu"))
        self.window = MixedWindow(self._count, config.weighting)
        settings = json.dumps(config.to_json(), sort_keys=True)
        self._every = choose_gram_every(config, automatic=EVERY)
        self._fingerprint = digest((settings + self.plan.fingerprint()).encode())
        check_equal(
            exchange,
            struct.pack("<q", self._fingerprint),
            "ranks disagree about the settings or the trained parameters: run one script on all",
        )
        self._tracker = RowTracker(config, model)
        self._current: Pass | None = None
        self._found: tuple[MixedBatch | LanguageError, Pass | None] | None = None
        self._passes: weakref.WeakKeyDictionary[Passage, Pass] = weakref.WeakKeyDictionary()
        self._reaching: list[tuple[Passage, int | None]] = []
        self._task: int | None = None  # the backward that has opened the micro-step
        self._open: list[Pass] = []  # the passes of it
        self._slot: MixedSlot | None = None
        self._unexpected: LanguageError | None = None  # of a window that was to be told
        self._decided: tuple[ToHost, ToHost] | None = None
        self._solved_for: tuple[Any, ...] = ()
        self._frozen: list[str] = []  # since register
        self._fresh = False  # whether the last window has taken Grams
        self._renews = False  # whether this window takes Grams because other parameters are frozen than before
        self._unaccounted = True
        for found in covered.found:
            of = {name: self.plan.block_of[number] for name, number in found.numbers.items()}
            modules.cover(found.module, modules.Covered(self, found.name, found.numbers, of, found.kind))
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True, prepend=True),
            model.register_forward_hook(Hook(self._after_forward)),
            register_optimizer_step_pre_hook(weak(self._before_optimizer_step)),
        ]
        switched_on.note(self)
        show_by_default()
        if exchange.rank == 0:
            logger.info(self.describe())

    def _place(self, device: torch.device) -> None:
        """Makes what lies where gradients are."""
        config, blocks = self.config, len(self.plan.blocks)
        backend = ops.choose_backend(config.backend, device)
        counting = self.plan.counting(self._count)
        self.estimate = GramEstimate(config, blocks, self.exchange, backend, device, counting)
        self.table = torch.zeros(blocks, self._count + 1, dtype=torch.float64, device=device)
        self.taps = [
            torch.zeros(2 * self._count, 2 * self._count, dtype=torch.float64, device=device, requires_grad=True)
            for _ in range(blocks)
        ]
        self._device = device

    def _follow(self, device: torch.device) -> None:
        """A model may go to its device after register, or keep its parameters elsewhere than it computes."""
        if device != self._device and not self.window.micro_steps:
            kept = self.estimate.state_dict()
            self._place(device)
            self.estimate.load_state_dict(kept)

    # --- what users call ----------------------------------------------------------------------------------------

    def language(
        self, language: object, target_tokens: object = None, loss_divisor: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Sets the languages of the forward passes inside the `with` block.

        Args:
            language: whatever the batch's entry may be: of the batch, of each sequence, or of each token.
            target_tokens: `[K]`, tokens of each language that the loss is taken over; counted from `labels` where left
                out.
            loss_divisor: see `bucketmoo_ds.data.batch`.
        """
        return self._tracker.language(language, target_tokens, loss_divisor)

    def expect(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Tells the micro-batches of the window that comes, so that each language's tokens are known before the first
        backward. On all ranks, or on none. One without valid languages is an error of that backward, on all ranks.
        """
        try:
            self.window.expect(self._tracker.count(batches).tolist(), len(batches))
        except LanguageError as error:
            self._unexpected = error

    @property
    def last(self) -> Resolution | None:
        """What was decided in the latest window."""
        return self.record.last

    @property
    def windows(self) -> int:
        """How many windows have been resolved."""
        return self.record.windows

    @property
    def in_window(self) -> bool:
        """Whether micro-steps have been taken that no optimizer step has used yet."""
        return self.window.micro_steps > 0

    @property
    def counters(self) -> Mapping[str, int]:
        """What has been counted since the run began."""
        return self.record.counters

    def abandon(self) -> None:
        """Gives up the window under way, after an error that was caught; to be called on all ranks. Clears the
        gradients."""
        self._tracker.forget()
        self._unexpected = None
        self._passes.clear()
        self._reaching.clear()
        self._close_micro_step()
        self._start_window()
        for parameter in self._model.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain JSON values; save it with the model and the optimizer.

        Raises:
            BucketMOOError: in the middle of a window.
        """
        if self.in_window:
            raise BucketMOOError("state_dict in the middle of a window: save after optimizer.step()")
        own = {**self.record.state_dict(), **self.estimate.state_dict(), **self.window.state_dict()}
        return {"languages": list(self.config.languages), "frozen": self._frozen, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: the state is of another model, granularity or mode, or of other languages.
        """
        if "grams" not in state:
            raise ConfigError("the checkpoint has no Grams: it was written by another mode than mixed")
        if state["languages"] != list(self.config.languages):
            raise ConfigError(
                f"the checkpoint has languages = {state['languages']}, here {list(self.config.languages)}: its Grams "
                "need the same languages in the same order"
            )
        self.record.load_state_dict(state)
        if not self.estimate.load_state_dict(state):
            self.record.warn(NO_MEMORY.format(self.config.aggregator))
        self.window.load_state_dict(state)
        self._frozen = list(state["frozen"])
        self._fresh = self.record.windows > 0 and (self.record.windows - 1) % self._every == 0

    def close(self) -> None:
        """Takes the hooks off again, and gives the modules their own forward."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        for found in self._covered.found if handles else ():  # closed before, they may be another session's by now
            modules.uncover(found.module)

    def describe(self) -> str:
        """Returns the line that is logged at start-up."""
        config = self.config
        return (
            f"bucket_moo: mixed, aggregator {config.aggregator}, granularity {config.granularity} "
            f"({len(self.plan.blocks)} blocks), {self._count} languages ({named(config)}), world size "
            f"{self.exchange.world_size}, Grams every {self._every} windows, smoothing {config.smoothing:g}; the "
            f"first window averages. {self._covered.describe()}"
        )

    # --- what covered modules ask -------------------------------------------------------------------------------

    def current(self) -> Pass | None:
        """See `modules.Driver`."""
        if not self.recomputes():
            return self._current
        passes = {self._passes.get(passage) for passage, _ in self._reaching}
        if len(passes) > 1:
            raise BucketMOOError(
                "activation checkpointing in a backward through several forward passes: nothing tells which of them is "
                "computed again; call backward after each, or concatenate their batches"
            )
        return next(iter(passes), None)

    def recomputes(self) -> bool:
        """See `modules.Driver`."""
        return graph_task() is not None

    # --- hooks --------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs, entries = self._tracker.strip(args, kwargs)
        if self.recomputes():
            return args, kwargs
        if module is not self._model:
            raise ConfigError(
                "mixed.register: a replica of the model runs, as nn.DataParallel makes them (Trainer does where one "
                "process sees several GPUs): start one process a GPU, with torchrun"
            )
        self._current = self._found = None
        if torch.is_grad_enabled():
            self.check_finished()
            if self.window.micro_steps == 0:
                self._note_frozen(self._covered.frozen())
            found = self._tracker.found(entries, args, kwargs)
            if isinstance(found, MixedBatch) and found.rows is not None:
                self._follow(found.rows.languages.device)
                self._current = Pass(found.rows, self._count, self._takes_grams)
            self._found = found, self._current
        return args, kwargs

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._found is None or self.recomputes():
            return
        found, batch = self._found
        self._found = self._current = None
        passage = self._tracker.remember(found, module.training)
        if batch is not None:
            self._passes[passage] = batch
            weakly = weakref.ref(passage)  # the outputs' hooks keep it
            batch.reached = lambda: self._reached_inside(weakly())
            if self._unaccounted:
                names = accounted.names_of(self._model)
                accounted.check(tensors_of(output), lambda leaf: names.get(id(leaf)))
                self._unaccounted = False
        watch(output, lambda: self._reached(passage))

    def _reached(self, passage: Passage) -> None:
        task = graph_task()
        if (passage, task) in self._reaching:
            return
        self._reaching.append((passage, task))
        if self._task is None:
            self._task = task
            self._open_micro_step()
        after_backward(lambda: self._after_backward(passage, task))

    def _reached_inside(self, passage: Passage | None) -> None:
        """A backward has come to a use. It came to the outputs before, or to none of them; a backward of its own, as
        reentrant checkpointing runs it, is part of the one that did."""
        if passage is None:
            raise BucketMOOError("a backward through a forward pass whose outputs are gone: begin it at the loss")
        if all(reached is not passage for reached, _ in self._reaching):
            self._reached(passage)

    def _after_backward(self, passage: Passage, task: int | None) -> None:
        self._reaching.remove((passage, task))
        batch = self._passes.pop(passage, None)
        if batch is not None:
            self._open.append(batch)
        if task == self._task and all(other != task for _, other in self._reaching):
            self._end_micro_step()

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if any(id(each) in stepped for each in self._model.parameters()):
            self.end_window()

    # --- a micro-step -------------------------------------------------------------------------------------------

    @property
    def _takes_grams(self) -> bool:
        return self._renews or self.record.windows % self._every == 0

    def _note_frozen(self, frozen: list[str]) -> None:
        """A window begins with these parameters frozen. Where that has changed, blocks come back that have an old Gram
        or none, and parameters to which no forward pass has been followed."""
        if frozen != self._frozen:
            self._frozen, self._renews, self._unaccounted = frozen, True, True

    def _open_micro_step(self) -> None:
        """Agrees with the other ranks on the languages of the micro-step, and fills the table."""
        whole = self.window.micro_steps >= self._micro_steps()
        if whole and all(parameter.grad is None for parameter in self._model.parameters()):
            self._start_window()  # it was cleared without a step, as GradScaler's are after an overflow
        slot = self._unexpected or self._tracker.mixed_slot(self._micro_steps(), self.exchange.world_size)
        position = {
            "window": self.record.windows,
            "micro-step": self.window.micro_steps,
            "settings or blocks": self._fingerprint,
            "frozen parameters": digest(" ".join(self._frozen).encode()),
        }
        error, mine = (str(slot), MixedSlot((0,) * self._count, 0.0)) if isinstance(slot, LanguageError) else ("", slot)
        told = tell_ranks(self.exchange, self.window.to_numbers(mine.target_tokens), error, position)
        self.window.add(told, self._micro_steps())
        self._slot = mine
        self._fill(mine.scale * self._divisor)

    @torch.no_grad()
    def _fill(self, factor: float) -> None:
        """Writes what the gradient of each row counts: the weight of its language in its block, times what makes the
        sum over ranks and micro-steps, divided by the framework as it is, the mean over the language's tokens."""
        shares = self.window.shares()
        if self.window.begins or self.window.present != self._solved_for[0]:
            # What the weights follow from: a rule that takes milliseconds is asked when one of it has changed.
            wanted = (self.window.present, self.window.units(), self.estimate.taken)
            if wanted != self._solved_for:
                self._solved_for = wanted
                gram, known = self.estimate.gram()
                units = to_device(wanted[1], torch.float64, self._device)
                gram = gram * torch.outer(units, units)
                weights = self.estimate.weights(gram, known, self.window.present, self._generator())
                self._decided, self._weights = (ToHost(gram), ToHost(weights)), weights
        counts = to_device([share * factor for share in shares], torch.float64, self._device)
        self.table.data[:, :-1] = self._weights * counts  # `.data`: autograd has saved the table

    def _generator(self) -> torch.Generator:
        """The rule's source of randomness: one for all windows between two Grams, also where a run is resumed there."""
        return self.record.generator(self.record.windows - (self.record.windows - 1) % self._every)

    @torch.no_grad()
    def _end_micro_step(self) -> None:
        assert self._slot is not None
        if any(batch.takes_grams for batch in self._open):
            zeros = torch.zeros_like(self.taps[0])
            groups = torch.stack([zeros if tap.grad is None else tap.grad for tap in self.taps])
            tokens = torch.stack([batch.target_tokens_by_group() for batch in self._open])
            self.estimate.add(groups, self._slot.scale / self._loss_scale(), tokens)
        self._close_micro_step()

    def _start_window(self) -> None:
        self.window.clear()
        self.estimate.clear()

    def _close_micro_step(self) -> None:
        for tap in self.taps:
            tap.grad = None
        self._open, self._task, self._slot = [], None, None

    def check_finished(self) -> None:
        """Raises `BucketMOOError` where a backward has not come to its end."""
        if self._task is not None:
            raise BucketMOOError(
                "the last backward did not come to its end, so that its window holds half a micro-step: after an error "
                "that you catch, call abandon() on every rank, clear the gradients, and begin the window anew"
            )

    def end_window(self) -> None:
        """The optimizer steps: what has come since the last step was one window.

        Raises:
            BucketMOOError: see `check_finished`.
            ConfigError: on every rank, see `checks.check_left_out`.
        """
        self.check_finished()
        if not self.window.micro_steps:
            return
        assert self._decided is not None
        took = self._takes_grams
        if took:
            self.estimate.finish(self.window.target_tokens)
            self._renews = False
            if self.plan.left_out:
                check_left_out(ToHost(self.estimate.gram()[0]).read(), self.plan, self.config.languages)
        gram, weights = (each.read() for each in self._decided)
        self.record.add(
            Resolution(
                window=self.record.windows,
                gram=gram,
                weights=self.window.used(weights),
                present=tuple(self.window.fed),
                target_tokens=tuple(self.window.target_tokens),
                nonfinite=(),
                fresh=self._fresh,
                left_out=self.plan.left_out,
            )
        )
        self._fresh = took
        self._start_window()


def check_mode(config: BucketMOOConfig) -> None:
    """Raises `ConfigError` where the settings ask for what the mixed mode does not do."""
    if not config.enabled:
        raise ConfigError("bucket_moo.enabled = false: register changes the model; leave the call out")
    if config.mode not in ("auto", "mixed"):
        raise ConfigError(f'bucket_moo.mode = "{config.mode}": mixed.register resolves in mode "mixed"; leave it out')
    if needs_losses(config):
        setting = "normalize" if config.normalize in BY_LOSS else "aggregator"
        raise ConfigError(
            f'bucket_moo.{setting} = "{getattr(config, setting)}": needs each language\'s loss of the window whose '
            'weights it decides, and in mode "mixed" these are decided before; use placed micro-batches of one '
            'language each, or "normalize": "l2"'
        )
    plain = {field.name: field.default for field in dataclasses.fields(config)}
    for name in ("exchange", "ranks_per_node", "row_storage"):
        if getattr(config, name) != plain[name]:
            raise ConfigError(
                f"bucket_moo.{name} = {getattr(config, name)!r}: means nothing in mode \"mixed\", where the wrapper "
                "reduces gradients and no rows are kept; leave it out"
            )
