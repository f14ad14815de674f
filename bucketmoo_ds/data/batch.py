"""What a micro-batch says about itself: its language, and how many target tokens its loss is a mean over."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import struct
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import LanguageError, did_you_mean

TOKENS_KEY = "target_tokens"
IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True)
class Slot:
    """One micro-batch of the window.

    Args:
        language: index of its language.
        target_tokens: tokens that its loss is a mean over.
        scale: `s_b`, such that the sum of `s_b g_b` over the language's micro-batches is `N_l row_l`.
    """

    language: int
    target_tokens: int
    scale: float

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
    """One forward pass.

    Args:
        language: index of its language.
        target_tokens: tokens that its loss is a mean over; 1 where nothing tells, so that micro-batches count alike.
        loss_items: where the model was told `num_items_in_batch`, that number: its loss is then a sum over tokens
            divided by it, not a mean.
    """

    language: int
    target_tokens: int
    loss_items: float | None = None


@dataclasses.dataclass(eq=False)
class Passage:
    """A forward pass that a backward may follow.

    Args:
        found: what it said about itself, or the error that finding out gave.
        aside: whether a backward has gone through it without bringing the parameters a gradient.
    """

    found: MicroBatch | LanguageError
    aside: bool = False


class LanguageTracker:
    """Takes the language off the batches of one rank and remembers it until their backward.

    An error is kept, not raised: all ranks have to learn of it, or the others would wait for this one for ever.
    """

    def __init__(self, config: BucketMOOConfig) -> None:
        self._config = config
        self._default: tuple[object, int | None] | None = None
        self.forget()

    def forget(self) -> None:
        """Forgets the forward passes that no backward has used."""
        self._pending: list[Passage] = []
        self._latest_in_evaluation: list[Passage] = []

    @contextlib.contextmanager
    def language(self, language: object, target_tokens: int | None = None) -> Iterator[None]:
        """Sets the language of the forward passes inside the `with` block."""
        before, self._default = self._default, (language, target_tokens)
        try:
            yield
        finally:
            self._default = before

    def strip(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Entries]:
        """Returns the arguments of a forward pass without our entries, and those entries.

        The caller's own dictionaries stay as they are.
        """
        entries = Entries()
        kwargs = entries.take(kwargs, self._config.language_key)
        stripped = tuple(
            entries.take(arg, self._config.language_key) if isinstance(arg, MutableMapping) else arg for arg in args
        )
        return stripped, kwargs, entries

    def note(self, entries: Entries, training: bool) -> Passage:
        """Remembers a forward pass that a backward may follow, and returns it.

        Args:
            training: whether the model is in training mode. A backward belongs to the forward passes in that mode; a
                model that is trained in evaluation mode, without dropout, has none, and then it belongs to the latest.
        """
        try:
            found: MicroBatch | LanguageError = self._micro_batch(entries)
        except LanguageError as error:
            found = error
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
        passages = self._pending or self._latest_in_evaluation
        self.forget()
        try:
            if not passages:
                raise LanguageError(
                    "a backward without a forward pass of the model since the last one: call the model that was "
                    "registered (the engine), not a module inside of it; and add losses over one forward pass up for "
                    "one backward"
                )
            pending = [each.found for each in passages if not each.aside] or [each.found for each in passages]
            batches = [batch for batch in pending if isinstance(batch, MicroBatch)]
            if len(batches) < len(pending):
                return next(batch for batch in pending if isinstance(batch, LanguageError))
            names = sorted({self._config.languages[batch.language] for batch in batches})
            if len(names) > 1:
                raise LanguageError(
                    f"one backward after forward passes in several languages ({', '.join(names)}); call backward after "
                    "each of them, or evaluate under torch.no_grad()"
                )
        except LanguageError as error:
            return error
        tokens = sum(batch.target_tokens for batch in batches)
        items = batches[0].loss_items
        if items is not None and not (math.isfinite(items) and (items > 0 or tokens == 0)):
            return LanguageError(f"num_items_in_batch = {items} with {tokens} target tokens: expected more than 0")
        scale = float(micro_steps * tokens) if items is None else items / world_size
        return Slot(batches[0].language, tokens, scale)

    def _micro_batch(self, entries: Entries) -> MicroBatch:
        default, default_tokens = self._default or (None, None)
        if entries.language is None and default is None:
            raise LanguageError(
                f'the micro-batch names no language: add the entry "{self._config.language_key}" to the batch, or run '
                'it inside `with engine.language("de"):`'
            )
        indices = {self._index(value) for value in (entries.language, default) if value is not None}
        if len(indices) > 1:
            raise LanguageError(
                f"the batch says {entries.language!r}, but engine.language(...) says {default!r}; name it in one place"
            )
        tokens = entries.target_tokens if entries.target_tokens is not None else default_tokens
        return MicroBatch(indices.pop(), self._count(tokens, entries.labels), entries.loss_items)

    def _index(self, value: object) -> int:
        if hasattr(value, "tolist"):  # tensors, and NumPy's arrays and numbers
            value = value.tolist()
        if isinstance(value, Sequence) and not isinstance(value, str):
            different = sorted({str(item) for item in value})
            if len(different) != 1:
                raise LanguageError(
                    f"a micro-batch of several languages ({', '.join(different) or 'none'}): each micro-batch is of "
                    "one language, as LanguageBatchSampler draws them"
                )
            value = value[0]
        languages = self._config.languages
        if isinstance(value, str):
            if value not in languages:
                raise LanguageError(
                    f'language "{value}" is not in bucket_moo.languages ({", ".join(languages)})'
                    f"{did_you_mean(value, languages)}"
                )
            return languages.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(languages):
            return value
        raise LanguageError(f"language {value!r}: expected a name, or an index from 0 to {len(languages) - 1}")

    def _count(self, tokens: object, labels: object) -> int:
        if tokens is not None:
            count = tokens.sum().item() if isinstance(tokens, torch.Tensor) else tokens
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise LanguageError(f"{TOKENS_KEY} = {count!r}: expected a whole number, 0 or more")
            return count
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return 1
        targets = labels[..., 1:] if self._config.shift_labels and labels.dim() > 1 else labels
        return int((targets != IGNORED_LABEL).sum())


@dataclasses.dataclass
class Entries:
    """Our entries of one forward pass, as they stood in its arguments."""

    language: object = None
    target_tokens: object = None
    labels: object = None
    loss_items: float | None = None

    def take(self, batch: Any, language_key: str) -> Any:
        """Returns a copy of the batch, of the same type, without the language and the token count, and keeps those."""
        rest = copy.copy(batch)
        self.language = rest.pop(language_key, self.language)
        self.target_tokens = rest.pop(TOKENS_KEY, self.target_tokens)
        self.labels = rest.get("labels", self.labels)
        items = rest.get("num_items_in_batch")
        if items is not None:
            self.loss_items = float(items)
        return rest
