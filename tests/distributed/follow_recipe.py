"""Worker: trains with what a recipe of CONTRIBUTING.md has added to a copy of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import worker

# The copy is the package, before anything imports that.
sys.path.insert(0, worker.arguments()[0]["copy"])
os.environ["BUCKETMOO_BACKEND"] = "reference"

import test_same_weights
import wrapped

import bucketmoo_ds as bm
from bucketmoo_ds import ops
from bucketmoo_ds.apps.cli.main import main


def run(*, copy: str, recipe: str, seed: int) -> dict[str, Any]:
    """Trains two windows of three languages in one process; returns the errors against the float64 reference, and what
    only this recipe is asked."""
    return {"package": bm.__file__} | RECIPES[recipe](seed)


def train(seed: int, **case: Any) -> dict[str, Any]:
    return wrapped.run(**{"wrapper": "single", "seed": seed, "micro_steps": 3, "languages": 3} | case)


def aggregator(seed: int) -> dict[str, Any]:
    gram = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    weights = bm.weights(gram, "inverse_norm", floor=1e-6)
    return train(seed, aggregator="inverse_norm") | {"weights_of": weights.tolist()}


def backend(seed: int) -> dict[str, Any]:
    from bucketmoo_ds.ops.backends import plain

    del os.environ["BUCKETMOO_BACKEND"]
    calls, gram = [], plain.gram
    plain.gram = lambda *arguments: calls.append(1) or gram(*arguments)
    # With rows in host memory, Grams are taken apart from adding up.
    found = train(seed, row_storage="host")
    return found | {"calls": len(calls), "auto": ops.choose_backend(), "backends": ops.BACKENDS}


def granularity(seed: int) -> dict[str, Any]:
    config = bm.BucketMOOConfig(languages=["de", "fr"], granularity="module")
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Sequential(torch.nn.Linear(2, 2))})
    session = bm.single.register(model, config, micro_steps=2)
    return train(seed, granularity="module") | {"blocks": session.moo.plan.blocks}


def framework(seed: int) -> dict[str, Any]:
    try:
        main(["plan", "--world", "1", "--per-node", "1", "--languages", "2", "--framework", "toy"])
    except SystemExit as ended:
        assert not ended.code
    return train(seed, wrapper="toy") | {"public": bm.toy.register.__module__, "alone": test_same_weights.ALONE}


RECIPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "aggregator": aggregator,
    "backend": backend,
    "granularity": granularity,
    "framework": framework,
}

if __name__ == "__main__":
    worker.serve(run)
