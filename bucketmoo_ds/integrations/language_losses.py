"""Losses of a model's target tokens by language, from what its forward passes return; and what is logged of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bucketmoo_ds.adapters.hooks import Hook, Stays
from bucketmoo_ds.aggregate.conflict import cosines, share_of_conflicts
from bucketmoo_ds.data.batch import IGNORED_LABEL, is_causal, shifts_labels
from bucketmoo_ds.logs import logger
from bucketmoo_ds.pipeline.resolution import Resolution


class TokenLosses(Stays):
    """Listens to a model: what its forward passes return (`logits`, or `log_probs` of TRL's fused head) has the loss of
    every target token, whoever makes a loss of it.

    Args:
        model: the model inside of any wrapper.
        count: K.
        shifted: whether it predicts `labels[..., 1:]`; `None` asks the model.
    """

    def __init__(self, model: nn.Module, count: int, shifted: bool | None) -> None:
        self._count = count
        self._shifted = shifts_labels(model) if shifted is None else shifted
        self._behind = shifted is None and is_causal(model) and not self._shifted  # a token predicts the first label
        self._expected: tuple[Any, Any, Any] | None = None
        self._found: tuple[Tensor, Tensor] | None = None
        self._silent = False  # it has been said that there are none
        self._handle = model.register_forward_hook(Hook(self._after_forward))

    def expect(self, inputs: Mapping[str, Any], languages: Any) -> None:
        """The passes that come are of this batch, whose languages are `[batch]`, or `[batch, sequence]` with -1."""
        self._found = None
        self._expected = inputs.get("labels"), inputs.get("shift_labels"), languages

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Returns the sums of the target tokens' losses and their numbers, each `[batch, K]` float64, of the latest
        pass that told them; `None` where none did."""
        found, self._found, self._expected = self._found, None, None
        if found is None and not self._silent:
            self._silent = True
            logger.warning("no loss by language: the model returns no logits for its labels, or has no labels")
        return found

    def close(self) -> None:
        """Listens no more."""
        self._handle.remove()

    @torch.compiler.disable
    @torch.no_grad()
    def _after_forward(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if self._expected is None:
            return
        labels, shift_labels, languages = self._expected
        losses = _losses(outputs, labels, shift_labels, self._shifted, self._behind)
        if losses is None:
            return
        told = torch.as_tensor(languages, device=losses.device)
        told = told[:, -losses.shape[1] :] if told.dim() == 2 else told[:, None].expand(losses.shape)
        counts = (told >= 0) & ~losses.isnan()
        sums = losses.new_zeros(len(losses), self._count, dtype=torch.float64)
        where = told.clamp(min=0)
        self._found = (
            sums.scatter_add(1, where, losses.where(counts, 0.0).double()),
            sums.scatter_add(1, where, counts.double()),
        )


def _losses(outputs: Any, labels: Any, shift_labels: Any, shifted: bool, behind: bool) -> Tensor | None:
    """Returns the loss of each target token, `[batch, tokens]` float32, NaN where there is none."""
    log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
    if isinstance(log_probs, Tensor) and isinstance(mask, Tensor):
        return (-log_probs.float()).where(mask, math.nan)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    targets = labels if shift_labels is None else shift_labels
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    if targets.dim() == 1:
        logits, targets = logits.unsqueeze(1), targets.unsqueeze(1)
    elif logits.dim() == 3 and targets.dim() == 2:
        length = targets.shape[1]
        logits = logits[:, -length - 1 : -1] if behind else logits[:, -length:]
        if shifted and shift_labels is None:
            logits, targets = logits[:, :-1], targets[:, 1:]
    if logits.shape[:-1] != targets.shape or logits.dim() != 3:
        return None
    # Row by row: logits in float32 are the largest thing that there is.
    rows = [cross_entropy(row.float(), to, ignore_index=IGNORED_LABEL, reduction="none") for row, to in
            zip(logits, targets.to(logits.device), strict=True)]  # fmt: skip
    return torch.stack(rows).where(targets.to(logits.device) != IGNORED_LABEL, math.nan)


class LanguageLog:
    """What has happened since the last log.

    Args:
        names: the K languages.
        device: where losses are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._losses = torch.zeros(2, len(self._names), dtype=torch.float64, device=self._device)
        self._windows: list[Resolution] = []

    def add_loss(self, language: int, summed: Tensor, tokens: int) -> None:
        """Adds a micro-batch of one language on this rank."""
        self._losses[0, language] += summed.detach().double()
        self._losses[1, language] += tokens

    def add_losses(self, sums: Tensor, tokens: Tensor) -> None:
        """Adds a micro-batch of several languages on this rank, each `[batch, K]`."""
        self._losses += torch.stack([sums.sum(0), tokens.sum(0)]).to(self._device)

    def add_window(self, window: Resolution) -> None:
        """Adds a window."""
        self._windows.append(window)

    def losses(self, reduce: Any) -> dict[str, float]:
        """Returns the mean loss per target token of each language that was fed, summed over the ranks."""
        sums, tokens = reduce(self._losses).tolist()
        each = zip(self._names, sums, tokens, strict=True)
        return {name: total / count for name, total, count in each if count}

    def take(self, reduce: Any) -> dict[str, float]:
        """Returns the entries of a log. To be called on all ranks, which have seen the same windows.

        Args:
            reduce: adds up a tensor over the ranks.
        """
        found = {f"loss/{name}": loss for name, loss in self.losses(reduce).items()}
        for index, name in enumerate(self._names):
            found[f"tokens/{name}"] = float(sum(window.target_tokens[index] for window in self._windows))
        whole = [window for window in self._windows if not window.nonfinite]
        for index, name in enumerate(self._names):
            weights = [float(window.weights[:, index].mean()) for window in whole if index in window.present]
            if weights:
                found[f"moo/weight/{name}"] = sum(weights) / len(weights)
        shares = [share for window in whole if not math.isnan(share := conflict(window))]
        if shares:
            found["moo/conflict"] = sum(shares) / len(shares)
        if self._windows:
            alone = sum(len(window.present) == 1 for window in self._windows)
            found["moo/single_language_windows"] = alone / len(self._windows)
        self.clear()
        return found


def conflict(window: Resolution) -> float:
    """Returns the mean over a window's blocks of the share of conflicting pairs of languages; NaN where none has a
    cosine."""
    present = list(window.present)
    return float(share_of_conflicts(cosines(window.gram[:, present][:, :, present])).nanmean())
