"""MGDA: the shortest vector in the convex hull of the rows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from bucketmoo_ds import ops
from bucketmoo_ds.aggregate.base import Aggregator, register
from bucketmoo_ds.errors import ConfigError


@register("mgda")
@dataclasses.dataclass(frozen=True)
class MGDA(Aggregator):
    """Multiple-gradient descent algorithm (Désidéri, C. R. Acad. Sci. Paris, 2012; Sener & Koltun, NeurIPS 2018).

    The weights minimise `w @ gram @ w` over the simplex. The combined row d then satisfies `<g_i, d> >= ||d||^2` for
    every language, so that a small step along -d harms none. Where the hull contains 0, d is 0: the block is Pareto
    stationary, and stands still. A zero row is such a case; all weight goes to the zero rows.

    A cap on the weights keeps a language of short rows from taking all the weight. It gives up the promise above: a
    language may be harmed where the shortest vector would need more weight than the cap.

    The op `min_norm` finds them: `w @ gram @ w - min_i (gram @ w)_i <= 1e-12 * trace` without a cap.

    Args:
        max_weight: no weight is larger, in (0, 1]; in a block of n languages the larger of it and 1/n holds, so that
            1/K or less is plain averaging and 1 no cap.
    """

    streams_up_to: ClassVar[int] = 64

    max_weight: float = 1.0

    def __post_init__(self) -> None:
        value = self.max_weight
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
            raise ConfigError(
                f'aggregator "mgda": max_weight = {value!r}: expected a number above 0 and at most 1 (1 is no cap)'
            )

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        return ops.min_norm(gram, mask, max_weight=float(self.max_weight))[0]
