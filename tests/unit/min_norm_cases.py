"""What the answer of every `min_norm` must be: feasible and optimal, also where rounding to float32 has left the Gram
indefinite."""

from __future__ import annotations

import torch
from torch import Tensor
from unit.aggregate.grams import times

# The duality gap relative to the Gram's trace. The ridge of 1e-13 and rounding, K * 1e-16, leave less.
GAP = 1e-12
# Rows of fewer dimensions than there are rows: products summed in float32 give the Gram eigenvalues below 0.
NOISY = ((8, 3), (32, 8), (64, 16))


def check(gram: Tensor, weights: Tensor, max_weight: float) -> None:
    """Asserts that the weights `[B, K]` of languages that are all there are feasible and optimal."""
    cap = max(max_weight, 1.0 / weights.shape[-1])
    assert bool((weights >= 0.0).all())
    assert float(weights.max()) <= cap
    # K roundings of at most half a unit in the last place of 1.
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights), dtype=torch.float64), rtol=0, atol=1e-14)
    assert float(gap(gram, weights, max_weight).max()) <= GAP


def gap(gram: Tensor, weights: Tensor, max_weight: float) -> Tensor:
    """Returns how much, relative to the trace, any point of the capped simplex could still gain, to first order.

    Of a positive semidefinite Gram that bounds the distance of half the square from its minimum. It vanishes exactly
    where the conditions of Karush, Kuhn and Tucker hold.
    """
    products = times(gram, weights)
    count = gram.shape[-1]
    cap = max(max_weight, 1.0 / count)
    filled = (1.0 - cap * torch.arange(count, dtype=torch.float64)).clamp(0.0, cap)
    best = (products.sort(-1).values * filled).sum(-1)
    return ((weights * products).sum(-1) - best) / sizes(gram)


def sizes(gram: Tensor) -> Tensor:
    """Returns the traces."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def noisy(blocks: int, count: int, rank: int, generator: torch.Generator) -> Tensor:
    """Returns Grams `[B, K, K]` of random rows in `rank` dimensions, each product wrong by 3e-8 of the rows' norms, and
    indefinite for it: about one in a thousand of 8 rows in 3 dimensions is not, and is left out."""
    drawn = blocks + 16
    rows = torch.randn(drawn, count, rank, generator=generator, dtype=torch.float64)
    norms = rows.norm(dim=-1)
    noise = torch.randn(drawn, count, count, generator=generator, dtype=torch.float64)
    noise = (noise + noise.mT) / 2.0**0.5
    grams = rows @ rows.mT + 3e-8 * noise * norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return grams[torch.linalg.eigvalsh(grams)[:, 0] < 0.0][:blocks]
