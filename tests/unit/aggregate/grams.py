"""Rows of the kinds that solvers find hard, drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds.aggregate import find, names

# Those that have to be told nothing (shares, primary languages, losses); the others have tests of their own.
RULES = tuple(name for name in names() if name not in ("anchor", "static") and not find(name).uses_losses)
KINDS = ("random", "common direction", "badly scaled", "rank deficient", "duplicate rows", "nearly parallel")


@st.composite
def rows(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, least: int = 2, most: int = 6, blocks: int = 4) -> Tensor:
    """Draws rows `[B, K, S]` float64 of one kind, from a seed that hypothesis prints when a test fails."""
    kind = draw(st.sampled_from(kinds))
    num_languages = draw(st.integers(least, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return make_rows(kind, blocks, num_languages, generator)


def make_rows(kind: str, blocks: int, num_languages: int, generator: torch.Generator) -> Tensor:
    """Returns rows `[B, K, K + 3]` float64 of the kind."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = num_languages + 3
    result = normal(blocks, num_languages, size)
    if kind == "common direction":
        result += 2.0 * normal(blocks, 1, size)
    elif kind == "badly scaled":
        result *= 10.0 ** (6.0 * torch.rand(blocks, num_languages, 1, generator=generator, dtype=torch.float64) - 3.0)
    elif kind == "rank deficient":
        result = normal(blocks, num_languages, 2) @ normal(blocks, 2, size)
    elif kind == "duplicate rows":
        half = num_languages // 2
        result[:, num_languages - half :] = result[:, :half]
    elif kind == "nearly parallel":
        result = normal(blocks, 1, size) + 1e-3 * result
    return result


def gram_of(rows: Tensor) -> Tensor:
    """Returns the Grams `[B, K, K]` of rows `[B, K, S]`."""
    return rows @ rows.mT


def times(gram: Tensor, weights: Tensor) -> Tensor:
    """Returns `<g_i, d>`, `[B, K]`, for the combined row d that the weights `[B, K]` give."""
    return (gram @ weights.unsqueeze(-1)).squeeze(-1)


def combined_error(rows: Tensor, left: Tensor, right: Tensor) -> float:
    """Returns the largest distance of two combined rows over the blocks, relative to the sizes of their parts.

    Where several weights are equally good (dependent rows) the combined row is what must agree.
    """
    parts = (left.abs() + right.abs()).unsqueeze(-1) * rows.norm(dim=-1, keepdim=True)
    difference = ((left - right).unsqueeze(-1) * rows).sum(-2).norm(dim=-1)
    return float((difference / parts.sum((-2, -1)).clamp(min=1e-300)).max())
