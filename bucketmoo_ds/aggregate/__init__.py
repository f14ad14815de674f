"""From the Grams of blocks to the weights of their languages: batched multi-objective solvers over `[B, K, K]`.

    weights(gram, "mgda")                    public, checks its input
    solve(gram, mask, create("mgda"), ...)   what the engine calls

Everything is float64, deterministic, and runs on the device of the Gram. A new aggregator is one file with one
class; the files of this package are listed below, a class elsewhere only needs `@register("name")`.
"""

from bucketmoo_ds.aggregate import cagrad, mean, mgda, pcgrad, upgrad  # noqa: F401  each registers its aggregator
from bucketmoo_ds.aggregate.apply import solve, weights
from bucketmoo_ds.aggregate.base import Aggregator, create, names, register

__all__ = ["Aggregator", "create", "names", "register", "solve", "weights"]
