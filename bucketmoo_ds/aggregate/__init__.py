"""From the Grams of blocks to the weights of their languages: batched multi-objective solvers over `[B, K, K]`.

    weights(gram, "mgda")                    public, checks its input
    solve(gram, mask, create("mgda"), ...)   what the engine calls

Everything is float64, deterministic, and runs on the device of the Gram. A new aggregator is one file with one
class: every file of this folder is imported here, a class elsewhere only needs `@register("name")`.
"""

import importlib
import pkgutil

from bucketmoo_ds.aggregate.apply import first_state, solve, weights
from bucketmoo_ds.aggregate.base import Aggregator, State, Stateful, create, find, names, register

__all__ = [
    "Aggregator",
    "State",
    "Stateful",
    "create",
    "find",
    "first_state",
    "names",
    "register",
    "solve",
    "weights",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # each registers its aggregator
