"""The plainest model that languages can be trained on in one process, and what its window's gradient has to be."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bucketmoo_ds
from bucketmoo_ds.adapters.session import Session

SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
LANGUAGES = ("de", "fr")
WIDTH = 4

Loss = Callable[[nn.Module, Tensor], Tensor]


def tiny_model() -> nn.Module:
    """Smooth, so that it can be differentiated twice."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 3))


def register(model: nn.Module, micro_steps: int = 2, **more: Any) -> Session:
    config = bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, aggregator="mean", granularity="parameter")
    return bucketmoo_ds.single.register(model, config, micro_steps=micro_steps, bucket_size=12, **more)


def square(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


def batches(count: int = 2, seed: int = SEED) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, WIDTH, generator=generator) for _ in range(count)]


def languages_of(inputs: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Batches with their languages, which take turns."""
    for number, each in enumerate(inputs):
        yield LANGUAGES[number % len(LANGUAGES)], each


def window(session: Session, model: nn.Module, inputs: list[Tensor], loss_of: Loss = square, **how: Any) -> None:
    for language, each in languages_of(inputs):
        with session.language(language):
            loss = loss_of(model, each)
        (loss / len(inputs)).backward(**how)


def gradient(model: nn.Module) -> Tensor:
    """Zeros stand for none."""
    parameters = list(model.parameters())
    return torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in parameters])


def mean_of_rows(model: nn.Module, inputs: list[Tensor], loss_of: Loss = square) -> Tensor:
    """Of micro-batches that count alike and languages that have equally many, on a model without a session."""
    total = sum(loss_of(model, each) for each in inputs) / len(inputs)
    parameters = list(model.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


def assert_mean_of_rows(session: Session, model: nn.Module, expected: Tensor) -> None:
    # A handful of float32 roundings, of rows that are about as long.
    torch.testing.assert_close(
        gradient(model), expected, rtol=0, atol=2e-6 * float(expected.abs().max()), msg=lambda said: f"{said}\n{SEED=}"
    )
    assert session.last.present == (0, 1)
