"""The whole method on one process, in float64, to be read: docs/theory.md in code.

Every fast and distributed path of the package is tested against `resolve_window`. It is not meant for training. It
shares no code with what it judges: everything but the rule itself stands here once more, on rows instead of Grams, and
the rule may be anybody's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from bucketmoo_ds.aggregate import Aggregator

Rule = Callable[[Tensor], Tensor]  # from a Gram [K, K] float64 to weights [K] in the averaging convention


@dataclasses.dataclass(frozen=True)
class MicroGradient:
    """The gradient of one micro-batch of the window.

    Args:
        language: index of its language.
        target_tokens: `n_b`, the tokens that its loss is a mean over.
        gradient: by parameter name, `g_b`: the gradient of the mean loss divided by M, as frameworks hand it over.
    """

    language: int
    target_tokens: int
    gradient: Mapping[str, Tensor]


def resolve_window(
    micro_gradients: Sequence[MicroGradient],
    blocks: Mapping[str, Sequence[str]],
    *,
    micro_steps: int,
    aggregator: Aggregator | Rule,
    weighting: str = "language",
    normalize: str = "none",
    rescale: str = "none",
    seed: int = 0,
    left_out: Mapping[str, Collection[int]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Resolves the conflicts of one window.

    Args:
        micro_gradients: one for each (micro-step, rank) slot.
        blocks: names of the parameters of each block.
        micro_steps: M.
        aggregator: the rule from a Gram to weights, one of this package or a function.
        weighting, normalize, rescale: as in `BucketMOOConfig`.
        seed: for aggregators with random orders.
        left_out: by block name, the languages that are no objectives there.

    Returns:
        By parameter name, the combined gradient (float64); and by block name, the weights `[K']` of the K' languages
        present, in ascending order.
    """
    tokens: dict[int, int] = {}
    for micro in micro_gradients:
        tokens[micro.language] = tokens.get(micro.language, 0) + micro.target_tokens
    present = sorted(language for language, count in tokens.items() if count > 0)

    def row(language: int, name: str) -> Tensor:
        """Gradient of the mean loss per target token of one language over the window."""
        parts = [
            (micro.target_tokens / tokens[language]) * micro_steps * micro.gradient[name].to(torch.float64)
            for micro in micro_gradients
            if micro.language == language and micro.target_tokens > 0
        ]
        mean = torch.stack(parts).sum(dim=0)
        if weighting == "token":
            mean = mean * len(present) * tokens[language] / sum(tokens.values())
        return mean

    combined: dict[str, Tensor] = {}
    weights_of: dict[str, Tensor] = {}
    for block, names in blocks.items():
        rows = torch.stack([torch.cat([row(language, name).flatten() for name in names]) for language in present])
        counting = [place for place, each in enumerate(present) if each not in (left_out or {}).get(block, ())]
        weights = torch.zeros(len(present), dtype=torch.float64)
        if counting:
            weights[counting] = _weights(rows[counting], aggregator, normalize, rescale, seed)
        flat = weights @ rows
        sizes = [micro_gradients[0].gradient[name].numel() for name in names]
        for name, part in zip(names, flat.split(sizes), strict=True):
            combined[name] = part.view(micro_gradients[0].gradient[name].shape)
        weights_of[block] = weights
    return combined, weights_of


def _weights(rows: Tensor, aggregator: Aggregator | Rule, normalize: str, rescale: str, seed: int) -> Tensor:
    """Returns the weights `[K]` of a block's rows `[K, S]`: docs/theory.md, section 4."""
    count = len(rows)
    average = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if count == 1 or not bool(torch.isfinite(rows @ rows.T).all()):
        return average

    norms = [float(row.norm()) for row in rows]
    longest = max(norms)
    if longest == 0.0:
        factors = [1.0] * count
    elif normalize == "unit":
        factors = [1.0 / norm if norm > 1e-15 * longest else 1.0 / longest for norm in norms]
    else:
        factors = [1.0 / longest] * count
    shown = rows * torch.tensor(factors, dtype=torch.float64).unsqueeze(1)
    weights = _rule(aggregator, count, seed)(shown @ shown.T).clone()

    if normalize == "unit":
        lengths = sorted(norm for norm in norms if norm > 1e-15 * longest)
        for index, norm in enumerate(norms):
            if norm > 1e-15 * longest:
                weights[index] *= lengths[(len(lengths) - 1) // 2] / norm
    if rescale == "mean":
        length = float((weights @ rows).norm())
        parts = math.fsum(abs(float(weight)) * norm for weight, norm in zip(weights, norms, strict=True))
        if length > 1e-6 * parts:  # else it has cancelled to rounding
            weights = weights * float(rows.mean(dim=0).norm()) / length
    return weights


def _rule(aggregator: Aggregator | Rule, count: int, seed: int) -> Rule:
    if not isinstance(aggregator, Aggregator):
        return aggregator
    everybody = torch.ones(1, count, dtype=torch.bool)
    return lambda gram: aggregator.weights(gram[None], everybody, torch.Generator().manual_seed(seed))[0]
