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
        loss: the mean loss, where something asks for it.
        half: of the language's micro-batches, for `gram="cross"`.
    """

    language: int
    target_tokens: int
    gradient: Mapping[str, Tensor]
    loss: float = math.nan
    half: int = 0


def resolve_window(
    micro_gradients: Sequence[MicroGradient],
    blocks: Mapping[str, Sequence[str]],
    *,
    micro_steps: int,
    aggregator: Aggregator | Rule,
    weighting: str = "language",
    normalize: str = "none",
    rescale: str = "none",
    preference: Sequence[float] | None = None,
    gram: str = "plain",
    seed: int = 0,
    left_out: Mapping[str, Collection[int]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Resolves the conflicts of one window.

    Args:
        micro_gradients: one for each (micro-step, rank) slot.
        blocks: names of the parameters of each block.
        micro_steps: M.
        aggregator: the rule from a Gram to weights, one of this package or a function.
        weighting, normalize, rescale, gram: as in `BucketMOOConfig`.
        preference: of each language.
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

    def row(language: int, name: str, halves: Sequence[int] = (0, 1)) -> Tensor:
        """Gradient of the mean loss per target token of one language over the window, or what one half is of it."""
        parts = [
            (micro.target_tokens / tokens[language]) * micro_steps * micro.gradient[name].to(torch.float64)
            for micro in micro_gradients
            if micro.language == language and micro.target_tokens > 0 and micro.half in halves
        ] or [torch.zeros_like(micro_gradients[0].gradient[name], dtype=torch.float64)]
        mean = torch.stack(parts).sum(dim=0)
        if weighting == "token":
            mean = mean * len(present) * tokens[language] / sum(tokens.values())
        return mean

    def loss(language: int) -> float:
        """Mean loss per target token of one language over the window."""
        fed = [micro for micro in micro_gradients if micro.language == language and micro.target_tokens > 0]
        return math.fsum(micro.target_tokens * micro.loss for micro in fed) / tokens[language]

    losses = [loss(language) for language in present]
    preferred = [1.0 if preference is None else preference[language] for language in present]
    combined: dict[str, Tensor] = {}
    weights_of: dict[str, Tensor] = {}
    for block, names in blocks.items():
        rows = torch.stack([torch.cat([row(language, name).flatten() for name in names]) for language in present])
        squares = [float(each @ each) for each in rows]
        for index, language in enumerate(present if gram == "cross" else ()):
            of = [micro for micro in micro_gradients if micro.language == language]
            fed = [sum(micro.target_tokens for micro in of if micro.half == half) for half in (0, 1)]
            if all(fed):
                parts = [torch.cat([row(language, name, (half,)).flatten() for name in names]) for half in (0, 1)]
                squares[index] = float(parts[0] @ parts[1]) * sum(fed) ** 2 / math.prod(fed)
        counting = [place for place, each in enumerate(present) if each not in (left_out or {}).get(block, ())]
        weights = torch.zeros(len(present), dtype=torch.float64)
        if counting:
            measured, liked, lost = ([of[place] for place in counting] for of in (squares, preferred, losses))
            weights[counting] = _weights(rows[counting], measured, aggregator, normalize, rescale, liked, lost, seed)
        flat = weights @ rows
        sizes = [micro_gradients[0].gradient[name].numel() for name in names]
        for name, part in zip(names, flat.split(sizes), strict=True):
            combined[name] = part.view(micro_gradients[0].gradient[name].shape)
        weights_of[block] = weights
    return combined, weights_of


def _weights(
    rows: Tensor,
    squares: Sequence[float],
    aggregator: Aggregator | Rule,
    normalize: str,
    rescale: str,
    preferred: Sequence[float],
    losses: Sequence[float],
    seed: int,
) -> Tensor:
    """Returns the weights `[K]` of a block's rows `[K, S]`: docs/theory.md, section 4. `squares` are their squared
    lengths, without noise where those are known."""
    count = len(rows)
    average = torch.tensor([each / math.fsum(preferred) for each in preferred], dtype=torch.float64)
    if count == 1 or not bool(torch.isfinite(rows @ rows.T).all()):
        return average

    norms = [float(row.norm()) for row in rows]
    size = {"l2": norms, "loss": losses, "loss_l2": [norm * loss for norm, loss in zip(norms, losses, strict=True)]}
    factors = [count * float(each) for each in average]
    if normalize != "none":
        sizes = size[normalize]
        counted = sorted(each for each in sizes if each > 1e-15 * max(sizes))
        for index, each in enumerate(sizes):
            if each > 1e-15 * max(sizes):
                factors[index] *= counted[(len(counted) - 1) // 2] / each
    scale = torch.tensor(factors, dtype=torch.float64)
    scaled = rows * scale.unsqueeze(1)
    longest = float(scaled.norm(dim=1).max()) or 1.0
    scaled = scaled / longest
    seen = _semidefinite(rows @ rows.T, squares)
    shown = scaled @ scaled.T + (seen - rows @ rows.T) * scale.outer(scale) / longest**2
    weights = scale * _rule(aggregator, average * count, losses, seed)(shown)
    if not torch.equal(seen, rows @ rows.T):
        weights = _no_longer_than_meant(weights, rows, seen)

    if rescale == "mean":
        length = float((weights @ rows).norm())
        parts = math.fsum(abs(float(weight)) * norm for weight, norm in zip(weights, norms, strict=True))
        if length > 1e-6 * parts:  # else it has cancelled to rounding
            weights = weights * float((average @ rows).norm()) / length
    return weights


def _semidefinite(gram: Tensor, squares: Sequence[float]) -> Tensor:
    """Returns the Gram with these squared lengths on its diagonal, and where it is not semidefinite then, the nearest
    that is, in units of the rows' lengths."""
    crossed = gram - torch.diag(gram.diagonal()) + torch.diag(torch.tensor(squares, dtype=torch.float64))
    if torch.allclose(crossed, gram, rtol=1e-14, atol=0.0):
        return gram
    units = gram.diagonal().sqrt()
    units[units == 0.0] = 1.0
    values, vectors = torch.linalg.eigh(crossed / units.outer(units))
    return (vectors * values.clamp(min=0.0)) @ vectors.T * units.outer(units)


def _no_longer_than_meant(weights: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """Returns the weights, scaled down where noise makes the combined row longer than the longest row, and longer in
    units of that than the Gram that the rule saw says."""
    length, longest = float((weights @ rows).norm()), float(rows.norm(dim=1).max())
    meant, longest_seen = (max(float(each), 0.0) ** 0.5 for each in (weights @ seen @ weights, seen.diagonal().max()))
    limit = longest * max(1.0, meant / longest_seen if longest_seen else 1.0)
    return weights * limit / length if length > limit else weights


def _rule(aggregator: Aggregator | Rule, preferred: Tensor, losses: Sequence[float], seed: int) -> Rule:
    if not isinstance(aggregator, Aggregator):
        return aggregator
    rule, everybody = aggregator, torch.ones(1, len(losses), dtype=torch.bool)
    if rule.uses_losses:
        rule = rule.with_losses(torch.tensor([losses], dtype=torch.float64), preferred[None])
    return lambda gram: rule.weights(gram[None], everybody, torch.Generator().manual_seed(seed))[0]
