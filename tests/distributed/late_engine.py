"""Worker: DeepSpeed engines that are made before the package is imported."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import worker

# Top-level entries of the JSON, by what is said of them.
ENTRIES: dict[str, dict[str, Any]] = {
    "asked for": {"bucket_moo": {"languages": ["de", "fr"]}},
    "misspelt": {"bucketmoo": {"languages": ["de", "fr"]}},
    "invalid": {"bucket_moo": {"languages": []}},
    "off": {"bucket_moo": {"languages": ["de", "fr"], "enabled": False}},
    "plain": {},
}


def main() -> None:
    worker.start()
    engines = {name: make(entries) for name, entries in ENTRIES.items()}
    assert "bucketmoo_ds" not in sys.modules
    import bucketmoo_ds  # noqa: F401

    worker.leave({name: [attempt(engine, call) for call in (backward, step)] for name, engine in engines.items()})


def make(entries: dict[str, Any]) -> Any:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, **entries}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def attempt(engine: Any, call: Any) -> str:
    """What the call raises, as its type and text; empty where it does not."""
    try:
        call(engine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def backward(engine: Any) -> None:
    engine.backward(engine(torch.randn(4, 3)).square().mean())


def step(engine: Any) -> None:
    engine.step()


if __name__ == "__main__":
    main()
