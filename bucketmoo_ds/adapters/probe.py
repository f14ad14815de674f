"""Which languages use which parameters, found by a backward of each: what `granularity: refined` is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.plan.blocks import plain_name


def probe_dependencies(
    model: nn.Module,
    batches_by_language: Mapping[str, Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, dict[str, list[str]]]:
    """Returns `granularity_options` for `refined`: the parameters that only some languages use, and who uses them.

    A language uses a parameter where one of its batches gives it a gradient with an element that is not zero. Where
    that holds for no language, as with what stands before a matrix of zeros (LoRA's, at the start), those use it whose
    losses depend on it in autograd's graph; a parameter that no loss depends on is not named.

    Batches show what is used, not what can never be: an expert that these batches did not reach may be reached later.
    So a gradient where none was expected is an error at the window's end, and more batches make it rarer.

    `.grad` and parameters stay as they are; buffers and random states move as in any forward pass.

    Args:
        model: in one process, before it is wrapped and registered.
        batches_by_language: some batches of every language of the run.
        loss: from the model and a batch to its loss; left out, `model(**batch).loss`.

    Raises:
        ConfigError: a model that is wrapped already, without trained parameters, or a language without batches.
        BucketMOOError: a loss that is not finite, or has no gradient that is.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
            raise ConfigError(f"probe_dependencies: the model is wrapped ({type(module).__name__}); probe it before")
    trained = {plain_name(name): each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise ConfigError("probe_dependencies: the model has no trainable parameter")
    reached: dict[str, set[str]] = {name: set() for name in trained}
    moved: dict[str, set[str]] = {name: set() for name in trained}
    for language, batches in batches_by_language.items():
        count = 0
        for batch in batches:
            count += 1
            value = loss(model, batch) if loss else model(**batch).loss
            found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, found, strict=True):
                if gradient is None:
                    continue
                if not bool(gradient.isfinite().all()):
                    raise BucketMOOError(
                        f'probe_dependencies: a batch of "{language}" has a gradient that is not finite'
                    )
                reached[name].add(language)
                if bool(gradient.count_nonzero()):
                    moved[name].add(language)
        if not count:
            raise ConfigError(f'probe_dependencies: no batch of "{language}": every language needs some')
    users = {name: moved[name] or reached[name] for name in trained}
    return {"used_by": _patterns(users, list(batches_by_language))}


def _patterns(users: Mapping[str, set[str]], languages: list[str]) -> dict[str, list[str]]:
    """The parameters that not all languages use, together where everything below a module has the same users."""
    patterns = {}
    for name, of in users.items():
        if not of or len(of) == len(languages):
            continue
        parts, pattern = name.split("."), _escaped(name)
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            if all(others == of for other, others in users.items() if other.startswith(prefix)):
                pattern = f"{_escaped(prefix)}*"
                break
        patterns[pattern] = [language for language in languages if language in of]
    return patterns


def _escaped(name: str) -> str:
    """A pattern that `fnmatch` takes literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
