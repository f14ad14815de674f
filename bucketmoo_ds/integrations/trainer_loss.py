"""How transformers' Trainer, or a subclass of it, divides the loss of the micro-step that it drives.

Trainer counts the target tokens of a window, `num_items_in_batch`, and hands the number to whoever makes the loss: the
model, its label smoother, a `compute_loss_func`, or the `compute_loss` of a subclass. So neither the model's arguments
nor its labels, which may be taken off before, say how the loss was divided; Trainer does. `install` wraps its
`training_step` and `compute_loss`, which go on as they are; what they say is read only where a backward is resolved.

A loss that Trainer makes, and TRL's SFTTrainer, are known. Of another one only its owner knows whether it is divided:
`loss_is_scaled_for_ga`, which transformers asks for there, says so.

Read in transformers 5.23 and 4.57 (`trainer.py`), and TRL 1.16 (`sft_trainer.py`). In 4.57 label smoothing, and what
`loss_is_scaled_for_ga` says against Trainer's own rule, would be wrong by the number of micro-steps: they are refused.
"""

from __future__ import annotations

import importlib.metadata
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bucketmoo_ds.data.batch import IGNORED_LABEL, Entries, shifts_labels, stated_loss, stating
from bucketmoo_ds.errors import LanguageError
from bucketmoo_ds.patches import wrap
from bucketmoo_ds.transfer import ToHost

# Divides the sum over the target tokens by `num_items_in_batch`, and multiplies it by the ranks, as Trainer does.
_DIVIDES_AS_TRAINER = "SFTTrainer.compute_loss"

# Trainers whose model has been looked at: the first micro-step tells.
_examined: weakref.WeakSet[Any] = weakref.WeakSet()


def install(module: ModuleType) -> None:
    """Wraps `transformers.Trainer`, and the label smoother that it takes from the same module."""
    wrap(module.Trainer, "training_step", _training_step)
    wrap(module.Trainer, "compute_loss", _compute_loss)
    wrap(module.LabelSmoother, "__call__", _smooth)


class TrainerLoss:
    """What a Trainer says about the loss of one micro-step: a `StatedLoss` of `data.batch`.

    Attributes:
        entries: the labels of the batch, as Trainer got it, or as its label smoother did.
        by_trainer: whether Trainer's own `compute_loss` made the loss.
        smoothed_mean: whether the label smoother was not told `num_items_in_batch`.
        made: in the first micro-step, the loss that the model has made of its labels, and the model's outputs.
    """

    def __init__(self, trainer: Any, inputs: Any, num_items: Any) -> None:
        self._trainer = trainer
        self._num_items = ToHost(num_items) if isinstance(num_items, Tensor) else num_items
        self.entries = Entries()
        if isinstance(inputs, Mapping):
            self.entries = Entries(labels=inputs.get("labels"), shift_labels=inputs.get("shift_labels"))
        self.by_trainer = False
        self.smoothed_mean = False
        self.made: tuple[Tensor, Any] | None = None

    def divisor(self) -> float | None:
        """See `StatedLoss`."""
        trainer, name = self._trainer, type(self._trainer).__name__
        by_function = trainer.compute_loss_func is not None
        handed_on = self._num_items is not None and (trainer.model_accepts_loss_kwargs or by_function)
        stated = getattr(trainer, "loss_is_scaled_for_ga", None)
        if stated not in (None, handed_on or by_function) and not _reads_statement(trainer):
            raise LanguageError(
                f"{name}.loss_is_scaled_for_ga = {stated}: transformers {_version()} does not read it, and would "
                f"{'' if stated else 'not '}divide the loss by the micro-steps; use transformers 5.23"
                + ("" if stated else ", or set `model.accepts_loss_kwargs = False` before the Trainer is made")
            )
        if handed_on and self.smoothed_mean:
            raise LanguageError(
                f"label_smoothing_factor: the label smoother of transformers {_version()} is not told "
                "num_items_in_batch and returns the mean of its micro-batch, which Trainer does not divide by the "
                "micro-steps: use transformers 5.23, or set `model.accepts_loss_kwargs = False` before the Trainer is "
                "made"
            )
        if not (handed_on or by_function if stated is None else stated):
            if self.by_trainer and handed_on:
                raise LanguageError(
                    f"{name}.loss_is_scaled_for_ga = False: the loss is said to be the mean of a micro-batch, but "
                    "Trainer hands num_items_in_batch on and multiplies the loss by the number of ranks. Divide the "
                    "sum by num_items_in_batch and set it to True, or set `model.accepts_loss_kwargs = False`"
                )
            return None
        if self._num_items is None:
            raise LanguageError(
                f"{name} takes its loss for normalised over the whole window, but has counted no num_items_in_batch: "
                "run the model inside `with session.language(language, target_tokens=..., loss_divisor=...):`, or set "
                "`loss_is_scaled_for_ga = False` if it is the mean of a micro-batch"
            )
        if stated is None and (by_function or not (self.by_trainer or _is_known(trainer))):
            raise LanguageError(
                f"{'compute_loss_func' if by_function else f'{name}.compute_loss'} makes the loss, and nothing tells "
                "how it is divided. Set `loss_is_scaled_for_ga = True` on the Trainer or in its class where it is the "
                "sum over the target tokens divided by num_items_in_batch"
                + ("" if by_function else ", and False where it is their mean")
            )
        items = float(self._num_items.read() if isinstance(self._num_items, ToHost) else self._num_items)
        all_ranks = trainer.args.average_tokens_across_devices
        ranks = trainer.accelerator.num_processes // trainer.get_tp_size() if all_ranks else 1
        if self.made is not None and self._is_mean(self.made[0].detach() / ranks, self.made[1], items):
            raise LanguageError(
                f"{type(trainer.model).__name__} is told num_items_in_batch and returns the mean of its micro-batch "
                "all the same: set `model.accepts_loss_kwargs = False` before the Trainer is made, which then divides "
                "the loss by the micro-steps"
            )
        return items / ranks

    @torch.no_grad()
    def _is_mean(self, loss: Tensor, outputs: Any, items: float) -> bool:
        """Whether a loss is the mean over its target tokens, although it should be their sum divided by `items`. Seen
        only where there are logits, and where the two differ; both tell apart what is 10 % away, in any dtype."""
        logits, labels = outputs.get("logits") if isinstance(outputs, Mapping) else None, self.entries.labels
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.shape[:-1] != labels.shape:
            return False
        if shifts_labels(self._trainer.model):
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        count = int((labels != IGNORED_LABEL).sum())
        if not 0 < count < items / 1.1:
            return False
        mean = cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        return bool((loss - mean).abs() < 0.02 * mean)


def _training_step(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def statement(model: Any, inputs: Any, num_items_in_batch: Any = None) -> TrainerLoss:
        return TrainerLoss(trainer, inputs, num_items_in_batch)

    try:
        with stating(statement(*args, **kwargs)):
            return wrapped(*args, **kwargs)
    finally:
        _examined.add(trainer)


def _compute_loss(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    stated = stated_loss()
    if not isinstance(stated, TrainerLoss):
        return wrapped(*args, **kwargs)
    stated.by_trainer = True
    if trainer in _examined or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return wrapped(*args, **kwargs)

    def with_outputs(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        stated.made = made = wrapped(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return made if return_outputs else made[0]

    return with_outputs(*args, **kwargs)


def _smooth(wrapped: Any, smoother: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The smoother is told whether to shift labels by the model's name, not as the model would do it itself."""
    stated = stated_loss()
    if isinstance(stated, TrainerLoss):
        stated.entries, stated.smoothed_mean = _smoothed(*args, **kwargs)
    return wrapped(*args, **kwargs)


def _smoothed(
    model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
) -> tuple[Entries, bool]:
    return Entries(shift_labels=labels[..., 1:] if shift_labels else labels), num_items_in_batch is None


def _reads_statement(trainer: Any) -> bool:
    """Whether Trainer itself has the attribute `loss_is_scaled_for_ga`, and so reads it."""
    return any(
        "loss_is_scaled_for_ga" in vars(each)
        for each in type(trainer).__mro__
        if each.__module__ == "transformers.trainer"
    )


def _version() -> str:
    return importlib.metadata.version("transformers")


def _is_known(trainer: Any) -> bool:
    compute_loss = type(trainer).compute_loss
    return bool(compute_loss.__module__.startswith("trl.") and compute_loss.__qualname__ == _DIVIDES_AS_TRAINER)
