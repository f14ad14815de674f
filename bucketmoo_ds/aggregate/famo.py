"""FAMO: weights from losses alone, moved so that all of them fall alike."""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import State, Stateful, check_number, register
from bucketmoo_ds.aggregate.mean import uniform

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, as torch has them
LEAST = 1e-100  # what a loss of 0 or below counts as


@register("famo")
@dataclasses.dataclass(frozen=True)
class FAMO(Stateful):
    """Fast adaptive multitask optimization (Liu, Feng, Stone & Liu, NeurIPS 2023, algorithm 1).

    With f_i a language's mean loss per target token and `z = softmax(xi)`, d is the gradient of `sum z_i log f_i`, the
    weights of which are brought to sum 1: `w_i = (z_i / f_i) / sum (z / f)`. Then xi is moved by Adam against
    `J_softmax(xi)' delta`, where delta_i is by how much `log f_i` has fallen: what falls slowly gets more.

    The paper takes f before and after a step on one batch, which costs another forward pass; its authors also allow to
    take the next batch's loss in place of it, and so it is here: delta is from the window before to this one, and holds
    the noise of both. A language that was away is held against the last window that had it. Where it is new, it takes
    no part in the move.

    A control, as `stch` is: it sees no conflict, and guarantees nothing by block. The state is xi and Adam's moments, K
    numbers each, of each block but alike in all of them. Weights do not depend on the scale of losses, which have to be
    positive. A `preference` counts as f's factor, so that it changes nothing but d's length. It does
    not stream, though it is cheap, for the same reason as `gradvac`.

    Args:
        lr: Adam's rate for xi.
        decay: Adam's weight decay of xi, added to its gradient; the authors' code has 0.01, others 1e-3 and 1e-5.
    """

    uses_losses: ClassVar[bool] = True

    lr: float = 0.025
    decay: float = 0.01
    _losses: Tensor | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("famo", "lr", self.lr, 0.0, 100.0)
        check_number("famo", "decay", self.decay, 0.0, 100.0)

    def with_losses(self, losses: Tensor, preference: Tensor) -> FAMO:
        """See `Aggregator.with_losses`."""
        here = copy.copy(self)
        object.__setattr__(here, "_losses", losses * preference)
        return here

    def start(self, languages: int) -> State:
        """See `Stateful.start`: xi, Adam's moments, the logarithm of the last loss, and in how many windows it was."""
        names = ("xi", "first", "second", "log_loss", "windows")
        return {name: torch.zeros(languages, dtype=torch.float64) for name in names}

    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        """See `Stateful.step`."""
        assert self._losses is not None
        losses = torch.where(mask, self._losses.clamp(min=LEAST), 1.0)
        log_loss, windows = losses.log(), state["windows"]
        known = mask & (windows > 0.0)
        share = softmax(state["xi"], known)
        fallen = torch.where(known, state["log_loss"] - log_loss, 0.0)
        gradient = share * (fallen - (share * fallen).sum(-1, keepdim=True)) + self.decay * state["xi"]
        first, second = (
            torch.where(known, beta * state[name] + (1.0 - beta) * each, state[name])
            for name, beta, each in (("first", BETAS[0], gradient), ("second", BETAS[1], gradient.square()))
        )
        steps = windows.clamp(min=1.0)
        length = (second / (1.0 - BETAS[1] ** steps)).sqrt() + EPS
        xi = torch.where(known, state["xi"] - self.lr * first / (1.0 - BETAS[0] ** steps) / length, state["xi"])
        weights = softmax(xi, mask) / losses
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0.0, weights / torch.where(total > 0.0, total, 1.0), uniform(mask))
        return weights, {
            "xi": xi, "first": first, "second": second, "log_loss": log_loss, "windows": windows + 1.0,
        }  # fmt: skip


def softmax(xi: Tensor, mask: Tensor) -> Tensor:
    """Returns the softmax over the languages of the mask, 0 elsewhere."""
    shown = torch.where(mask, xi, -torch.inf).softmax(-1)
    return torch.where(mask, shown, 0.0)
