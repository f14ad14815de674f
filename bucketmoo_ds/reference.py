"""The whole method on one process, in float64, to be read: docs/theory.md in code.

Every fast and distributed path of the package is tested against `resolve_window`. It is not meant for training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bucketmoo_ds import aggregate


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
    aggregator: aggregate.Aggregator,
    weighting: str = "language",
    normalize: str = "none",
    rescale: str = "none",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Resolves the conflicts of one window.

    Args:
        micro_gradients: one for each (micro-step, rank) slot.
        blocks: names of the parameters of each block.
        micro_steps: M.
        aggregator: the rule from a Gram to weights.
        weighting, normalize, rescale: as in `BucketMOOConfig`.
        seed: for aggregators with random orders.

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
        gram = rows @ rows.T
        weights = aggregate.solve(
            gram[None],
            torch.ones(1, len(present), dtype=torch.bool),
            aggregator,
            normalize=normalize,
            rescale=rescale,
            generator=torch.Generator().manual_seed(seed),
        )[0]
        flat = weights @ rows
        sizes = [micro_gradients[0].gradient[name].numel() for name in names]
        for name, part in zip(names, flat.split(sizes), strict=True):
            combined[name] = part.view(micro_gradients[0].gradient[name].shape)
        weights_of[block] = weights
    return combined, weights_of
