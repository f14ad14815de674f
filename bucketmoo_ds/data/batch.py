"""What a micro-batch says about itself: its language, its target tokens, and how its loss was normalised.

This is the one place that knows the last. Where nobody says otherwise, the loss of a micro-batch is the *mean* over its
target tokens, and the framework divides it by the M micro-steps of a window. A loss may also be the *sum* over them,
divided by a number that is alike in the whole window. That number is told, in this order, by

    a `loss_divisor` of the batch or of `language(...)`;
    transformers' Trainer, which says what it makes of its loss (see `StatedLoss`);
    `num_items_in_batch` among the model's arguments: the target tokens of the window on all ranks, by which the model
    divides, and what it returns is multiplied by the number of ranks, as Trainer does it.

A divisor is worth nothing without the number of target tokens, which nobody then divided by: both, or an error.

Where the settings ask for the languages' losses, a micro-step also says what the sum over its target tokens is: from
`tell_loss`, or from the loss that the model returned, if that is what backward went through.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.errors import LanguageError
from bucketmoo_ds.plan.choices import needs_losses
from bucketmoo_ds.transfer import ToHost

T = TypeVar("T")

Row = tuple[int, int]  # a language, and which half of its micro-batches

TOKENS_KEY = "target_tokens"
DIVISOR_KEY = "loss_divisor"
IGNORED_LABEL = -100

_WAY_OUT = (
    "tell it before backward, `session.tell_loss(loss)` (under DeepSpeed `engine.tell_loss(loss)`), as the mean loss "
    "per target token; or let the model return what it is trained on, as `.loss`"
)

# Losses of transformers whose labels stand where they are predicted, by a model's `loss_type`.
_LOSSES_IN_PLACE = ("ForMaskedLM", "ForTokenClassification")
# Of peft's prompt learning, what leaves the sequences as long as they are.
_CACHED = ("PREFIX_TUNING", "CARTRIDGE")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One micro-batch of the window.

    Args:
        language: index of its language.
        target_tokens: tokens that its loss is a mean over.
        scale: `s_b`, such that the sum of `s_b g_b` over the language's micro-batches is `N_l row_l`.
        loss: the sum of its target tokens' losses, where the settings ask for it; a number on any device.
        half: of the language's micro-batches of the window, where Grams are taken across two halves. It follows from
            the slots of all ranks, and is not sent.
    """

    language: int
    target_tokens: int
    scale: float
    loss: Tensor | None = dataclasses.field(default=None, compare=False)
    half: int = 0

    @property
    def row(self) -> Row:
        """The stored row that it counts for."""
        return self.language, self.half

    def to_numbers(self) -> list[int]:
        """Returns the slot as 64-bit numbers, to be sent to other ranks."""
        return [self.language, self.target_tokens, struct.unpack("<q", struct.pack("<d", self.scale))[0]]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Slot:
        """Returns the slot that `to_numbers` gave these for."""
        language, target_tokens, scale = numbers
        return cls(language, target_tokens, struct.unpack("<d", struct.pack("<q", scale))[0])


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass. Numbers that lie on a device are on their way to the host (`ToHost`), and read when a backward
    has come: a forward pass waits for nothing. The host's are read at once, for they may be overwritten.

    Args:
        language: index of its language.
        target_tokens: tokens that its loss is taken over; `None` where nothing tells.
        loss_divisor: what their summed loss is divided by, where the user says so.
        num_items: the `num_items_in_batch` that the model was told.
    """

    language: int
    target_tokens: int | ToHost | None = None
    loss_divisor: float | ToHost | None = None
    num_items: float | ToHost | None = None


class StatedLoss(Protocol):
    """What the trainer that drives a micro-step says about its loss.

    Attributes:
        entries: the labels of the batch as the trainer got it; it may take them off before the model is called.
    """

    entries: Entries

    def divisor(self) -> float | None:
        """Returns what the sum over the target tokens is divided by; `None` for their mean, divided by M.

        Raises:
            LanguageError: the trainer does not say, or contradicts itself.
        """


# Of the process, not of a thread: backward may run in threads of autograd's.
_stated: list[StatedLoss] = []


@contextlib.contextmanager
def stating(loss: StatedLoss) -> Iterator[None]:
    """The micro-steps inside the `with` block are driven by a trainer, which says this about their loss."""
    _stated.append(loss)
    try:
        yield
    finally:
        _stated.pop()


def stated_loss() -> StatedLoss | None:
    """What the trainer says that drives the present micro-step, if one does."""
    return _stated[-1] if _stated else None


@dataclasses.dataclass(eq=False)
class Passage:
    """A forward pass that a backward may follow.

    Args:
        found: what it said about itself, or the error that finding out gave.
        aside: whether a backward has gone through it without bringing the parameters a gradient.
        loss: the loss that the model returned, once a backward has gone through it.
    """

    found: MicroBatch | LanguageError
    aside: bool = False
    loss: Tensor | None = None

    @property
    def batch(self) -> MicroBatch:
        """What it said about itself.

        Raises:
            LanguageError: finding out gave an error.
        """
        if isinstance(self.found, LanguageError):
            raise self.found
        return self.found

    def watch(self, output: Any) -> None:
        """Keeps the loss in what the model returned, once a backward goes through it."""
        loss = _loss_in(output)
        if loss is not None and loss.requires_grad:
            kept = loss.detach().clone()  # a trainer may scale the loss in place before backward

            def keep(gradient: Tensor) -> None:
                self.loss = kept

            loss.register_hook(torch.compiler.disable(keep))


class LanguageTracker:
    """Takes the language off the batches of one rank and remembers it until their backward.

    An error is kept, not raised: all ranks have to learn of it, or the others would wait for this one for ever.

    Args:
        config: the settings.
        model: tells whether labels are shifted, where the settings leave it open.
    """

    def __init__(self, config: BucketMOOConfig, model: nn.Module | None = None) -> None:
        self._table = LanguageTable(config.languages)
        self._key = config.language_key
        self._shifted = shifts_labels(model) if config.shift_labels is None else config.shift_labels
        self._needs_losses = needs_losses(config)
        self._default = Entries()
        self.forget()

    def forget(self) -> None:
        """Forgets the forward passes that no backward has used."""
        self._told_loss: Tensor | None = None
        self._pending: list[Passage] = []
        self._latest_in_evaluation: list[Passage] = []

    @contextlib.contextmanager
    def language(
        self, language: object, target_tokens: object = None, loss_divisor: float | None = None
    ) -> Iterator[None]:
        """Sets the language of the forward passes inside the `with` block, and how their loss is normalised."""
        before = self._default
        self._default = Entries(language=language, target_tokens=target_tokens, loss_divisor=loss_divisor)
        try:
            yield
        finally:
            self._default = before

    def strip(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Entries]:
        """Returns the arguments of a forward pass without our entries, and those entries.

        The caller's own dictionaries stay as they are.
        """
        entries = Entries()
        kwargs = entries.take(kwargs, self._key)
        stripped = tuple(entries.take(arg, self._key) if isinstance(arg, MutableMapping) else arg for arg in args)
        return stripped, kwargs, entries

    def tell_loss(self, loss: Tensor | float) -> None:
        """Is told the mean loss per target token of the micro-step whose backward comes next.

        Raises:
            LanguageError: it is no number.
        """
        told = loss.detach() if isinstance(loss, Tensor) else torch.tensor(_number("loss", loss), dtype=torch.float64)
        if told.numel() != 1:
            raise LanguageError(f"tell_loss: a tensor of shape {list(told.shape)}; expected one number")
        self._told_loss = told.reshape(())

    def note(self, entries: Entries, training: bool, output: Any = None) -> Passage:
        """Remembers a forward pass that a backward may follow, and returns it.

        Args:
            output: what the model has returned.
            training: whether the model is in training mode. A backward belongs to the forward passes in that mode; a
                model that is trained in evaluation mode, without dropout, has none, and then it belongs to the latest.
        """
        try:
            found: MicroBatch | LanguageError = self._micro_batch(entries)
        except LanguageError as error:
            found = error
        passage = self.remember(found, training)
        if self._needs_losses:
            passage.watch(output)
        return passage

    def remember(self, found: MicroBatch | LanguageError, training: bool) -> Passage:
        """Remembers what a forward pass said about itself; see `note`."""
        passage = Passage(found)
        if training:
            self._pending.append(passage)
        else:
            self._latest_in_evaluation = [passage]
        return passage

    def set_aside(self, passage: Passage) -> None:
        """A backward went through the forward pass and brought no parameter a gradient: the next micro-step is not its,
        unless another backward comes to it (`bring_back`)."""
        passage.aside = True

    def bring_back(self, passage: Passage) -> None:
        """A backward comes to the forward pass."""
        passage.aside = False

    def slot(self, micro_steps: int, world_size: int) -> Slot | LanguageError:
        """Returns the slot of the forward passes since the last call, which this micro-step's backward belongs to.

        The scale makes the sum of `scale * gradient` over a language's micro-batches the gradient of the sum of its
        token losses, see docs/theory.md, section 2.
        """
        told = self._told_loss
        try:
            passages = self._take()
            batches = [each.batch for each in passages]
            language = self._language(batches)
            tokens, divisor = self._normalisation(batches, world_size)
            loss = self._summed_loss(passages, tokens, divisor, told) if self._needs_losses and tokens else None
            return Slot(language, tokens, float(micro_steps * tokens) if divisor is None else divisor, loss)
        except LanguageError as error:
            return error

    def _take(self) -> list[Passage]:
        """Returns the forward passes since the last call, and forgets them."""
        passages = self._pending or self._latest_in_evaluation
        self.forget()
        if not passages:
            raise LanguageError(
                "a backward without a forward pass of the model since the last one: call backward once after every "
                "forward pass, before the next one (add losses over one forward pass up for it), and call the "
                "model that was registered (the engine), not a module inside of it"
            )
        return [each for each in passages if not each.aside] or passages

    def _summed_loss(
        self, passages: Sequence[Passage], tokens: int, divisor: float | None, told: Tensor | None
    ) -> Tensor:
        """Returns the sum of the losses of a micro-step's target tokens; nothing waits for the device."""
        if told is not None:
            return tokens * told.double()
        batches = [each.batch for each in passages]
        counts: list[float] = [_count(_read(each.target_tokens or 0)) for each in batches]
        if sum(counts) != tokens:  # they do not say, and count as one each, or as a trainer's labels do
            counts = [tokens / len(batches)] * len(batches)
        sums = []
        for passage, batch, count in zip(passages, batches, counts, strict=True):
            if count == 0:
                continue
            if passage.loss is None:
                raise LanguageError(
                    f"a setting asks for the languages' losses, but backward went through no loss that the model "
                    f"returned: {_WAY_OUT}"
                )
            if divisor is not None and batch.num_items is None:
                raise LanguageError(
                    f"a setting asks for the languages' losses, but of a sum divided by {divisor:g} nothing tells how "
                    f"much of that the model did: {_WAY_OUT}"
                )
            items = count if divisor is None else _number("num_items_in_batch", _read(batch.num_items))
            sums.append(items * passage.loss.double().reshape(()))
        return torch.stack(sums).sum()

    def _language(self, batches: Sequence[MicroBatch]) -> int:
        names = sorted({self._table.names[batch.language] for batch in batches})
        if len(names) > 1:
            raise LanguageError(
                f"one backward after forward passes in several languages ({', '.join(names)}); call backward after "
                "each of them, or evaluate under torch.no_grad()"
            )
        return batches[0].language

    def _normalisation(self, batches: Sequence[MicroBatch], world_size: int) -> tuple[int, float | None]:
        """Returns the target tokens of a micro-step, and what their summed loss is divided by; `None` for the mean."""
        stated = stated_loss()
        told = [batch.target_tokens for batch in batches if batch.target_tokens is not None]
        if not told and stated is not None:
            told = [each for each in [self._count_labels(stated.entries)] if each is not None]
        tokens = sum(_count(_read(each)) for each in told) if told else None
        items = _only("num_items_in_batch", [batch.num_items for batch in batches])
        divisor, source = _only(DIVISOR_KEY, [batch.loss_divisor for batch in batches]), DIVISOR_KEY
        if divisor is None and stated is not None:
            divisor, source = stated.divisor(), "Trainer's num_items_in_batch"
            if divisor is None and items is not None:
                raise LanguageError(
                    f"the model was told num_items_in_batch = {items:g}, but Trainer takes its loss for the mean of a "
                    "micro-batch: set `loss_is_scaled_for_ga = True` on the Trainer if it divides the loss by that "
                    "number, or do not pass it on"
                )
        elif divisor is None and items is not None:
            divisor, source = items / world_size, "num_items_in_batch"
        if divisor is None:
            return (len(batches) if tokens is None else tokens), None
        if tokens is None:
            raise LanguageError(
                f"{source}: the loss is a sum divided by {divisor:g}, but nothing tells over how many target tokens, "
                f"as the model was given no labels: add the entry {TOKENS_KEY} to the batch, or run it inside "
                f"`with engine.language(language, {TOKENS_KEY}=...):`"
            )
        if not (math.isfinite(divisor) and (divisor > 0 or tokens == 0)):
            raise LanguageError(f"{source} = {divisor} with {tokens} target tokens: expected more than 0")
        return tokens, divisor

    def _micro_batch(self, entries: Entries) -> MicroBatch:
        told = self._languages_told(entries)
        indices = {self._table.index_of_batch(value) for value in told}
        if len(indices) > 1:
            raise LanguageError(
                f"the batch says {entries.language!r}, but engine.language(...) says {self._default.language!r}; name "
                "it in one place"
            )
        tokens = self._tokens_told(entries)
        return MicroBatch(
            indices.pop(),
            self._count_labels(entries) if tokens is None else _told(tokens, _count),
            *self._loss_told(entries),
        )

    def _languages_told(self, entries: Entries) -> list[object]:
        """Returns what the batch and `language(...)` say; at least one of them does."""
        told = [value for value in (entries.language, self._default.language) if value is not None]
        if not told:
            raise LanguageError(
                f'the micro-batch names no language: add the entry "{self._key}" to the batch, or run it inside '
                '`with engine.language("de"):`'
            )
        return told

    def _tokens_told(self, entries: Entries) -> object:
        return entries.target_tokens if entries.target_tokens is not None else self._default.target_tokens

    def _loss_told(self, entries: Entries) -> tuple[float | ToHost | None, float | ToHost | None]:
        """Returns the loss_divisor and num_items."""
        divisor = entries.loss_divisor if entries.loss_divisor is not None else self._default.loss_divisor
        return (
            _told(divisor, functools.partial(_number, DIVISOR_KEY)),
            _told(entries.num_items, functools.partial(_number, "num_items_in_batch")),
        )

    def _count_labels(self, entries: Entries) -> ToHost | None:
        """Returns the target tokens among the labels; `None` where there are none that can be counted."""
        labels = entries.shift_labels if entries.shift_labels is not None else entries.labels
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return None
        shifted = self._shifted and labels.dim() > 1 and entries.shift_labels is None
        return ToHost(((labels[..., 1:] if shifted else labels) != IGNORED_LABEL).sum())


@dataclasses.dataclass
class Entries:
    """What the arguments of one forward pass say, as it stood there."""

    language: object = None
    target_tokens: object = None
    loss_divisor: object = None
    labels: object = None
    shift_labels: object = None
    num_items: object = None

    def take(self, batch: Any, language_key: str) -> Any:
        """Returns a copy of the batch, of the same type, without our entries, and keeps what it says."""
        rest = copy.copy(batch)
        self.language = rest.pop(language_key, self.language)
        self.target_tokens = rest.pop(TOKENS_KEY, self.target_tokens)
        self.loss_divisor = rest.pop(DIVISOR_KEY, self.loss_divisor)
        self.labels = rest.get("labels", self.labels)
        self.shift_labels = rest.get("shift_labels", self.shift_labels)
        self.num_items = rest.get("num_items_in_batch", self.num_items)
        return rest


def _loss_in(output: Any) -> Tensor | None:
    """Returns the loss in what a model has returned: its `loss`, its first entry, or the number that it is."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif not isinstance(output, Tensor):
        output = output[0] if isinstance(output, Sequence) and output else getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.numel() == 1 else None


def _told(value: object, number: Callable[[object], T]) -> T | ToHost | None:
    """Returns the number that a value is, or a device's tensor on its way to the host."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return ToHost(value)
    return None if value is None else number(value)


def _read(told: T | ToHost) -> T | Tensor:
    return told.read() if isinstance(told, ToHost) else told


def _only(name: str, told: Sequence[float | ToHost | None]) -> float | None:
    """Returns the one number that the forward passes of a backward were told."""
    different = sorted({_number(name, _read(number)) for number in told if number is not None})
    if len(different) > 1:
        raise LanguageError(f"one backward after forward passes with several {name} ({different}); expected one")
    return different[0] if different else None


def _count(tokens: Any) -> int:
    count = tokens.sum().item() if hasattr(tokens, "sum") else tokens
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise LanguageError(f"{TOKENS_KEY} = {count!r}: expected a whole number, 0 or more")
    return count


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise LanguageError(f"{name} = {value!r}: expected a number") from None


def virtual_tokens(model: nn.Module | None) -> str:
    """Returns how a model that peft wraps gets trained virtual tokens, which each of its sequences attends to: `read`
    in front of the sequence (prompt tuning, p-tuning), or `cached` as keys and values (prefix tuning); else nothing."""
    for module in model.modules() if model is not None else ():
        active: Any = getattr(module, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            return "cached" if str(getattr(active.peft_type, "value", active.peft_type)) in _CACHED else "read"
    return ""


def shifts_labels(model: nn.Module | None) -> bool:
    """Whether a model predicts `labels[..., 1:]`: whether it is causal, and no virtual token predicts the first."""
    return is_causal(model) and virtual_tokens(model) != "read"


def is_causal(model: nn.Module | None) -> bool:
    """Whether a position of a model predicts the next label. Those with a decoder of their own, and those that label
    the tokens they read, take labels as they stand."""
    for module in model.modules() if model is not None else ():
        encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", None)
        if encoder_decoder is not None:  # the outermost that says so: wrappers have no such config, parts come later
            return not encoder_decoder and getattr(module, "loss_type", None) not in _LOSSES_IN_PLACE
    return True
