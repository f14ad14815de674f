"""Solving asks the device nothing: no read, no boolean index and no copy but of what is drawn.

The Grams are meta tensors: a device of their own, whose tensors have no values, so that whatever reads one fails. A
dispatch mode names the op.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bucketmoo_ds.aggregate import Aggregator, create, first_state, names, solve
from bucketmoo_ds.config import CHOICES

READS = (
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_static", "unique",
)  # fmt: skip
OPTIONS = {"anchor": {"primary": [0, 2]}}
RULES = tuple(name for name in names() if name != "static")
LOSSES = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


class Watch(TorchDispatchMode):
    """Notes the ops that make the host wait, and the copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        index = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if name in READS or (index and any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]))):
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "copy"):
            devices = {tensor.device.type for tensor in [*given, result]}
            if len(devices) > 1:
                self.copies.append(name)
        return result


# What `solve` does around a rule is the same for all.
@pytest.mark.parametrize(
    ("rule", "normalize", "rescale"),
    [
        *((rule, "none", "none") for rule in RULES),
        *itertools.product(["mean"], CHOICES["normalize"], CHOICES["rescale"]),
    ],
)
def test_no_rule_asks_the_device(rule: str, normalize: str, rescale: str) -> None:
    gram = torch.empty(3, 4, 4, dtype=torch.float64, device="meta")
    mask = torch.empty(3, 4, dtype=torch.bool, device="meta")
    told = torch.empty(4, dtype=torch.float64, device="meta")
    made = create(rule, **OPTIONS.get(rule, {}))
    start = first_state(made, 4, weight_smoothing=0.5)
    state = {name: torch.empty(3, *each.shape, dtype=each.dtype, device="meta") for name, each in start.items()}
    how = {"normalize": normalize, "rescale": rescale, "weight_smoothing": 0.5, "state": state}
    with Watch() as watch:
        found = solve(
            gram, mask, made, preference=told, losses=told, generator=torch.Generator().manual_seed(0), **how
        )
    assert (found.device.type, found.shape, found.dtype) == ("meta", (3, 4), torch.float64)
    assert watch.waits == []
    # What is drawn is drawn on the host, so that all ranks draw alike; without_a_wait.py sees that nobody waits for it.
    assert len(watch.copies) == (rule in ("anchor", "gradvac", "pcgrad", "random", "stch"))


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_asks_where_it_could(rule: str) -> None:
    """The same with values, where a read would pass unseen: on the CPU, steps that depend on them included."""
    rows = torch.randn(3, 4, 6, dtype=torch.float64)
    made = create(rule, **OPTIONS.get(rule, {}))
    with Watch() as watch:
        on = torch.ones(3, 4, dtype=torch.bool)
        solve(rows @ rows.mT, on, made, losses=LOSSES, generator=torch.Generator())
    assert watch.waits == []
    assert watch.copies == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda gram, mask: float(gram.sum()) * mask,
        lambda gram, mask: mask * gram[mask].sum(),
        lambda gram, mask: gram[mask.nonzero()[:, 0]][:1, :, 0] * mask,
        lambda gram, mask: gram[..., 0].masked_fill(mask, 1.0) if bool(mask.any()) else gram[..., 0],
        lambda gram, mask: gram[..., 0].index_put((mask,), gram.sum()),
    ],
)
def test_the_watch_sees_who_asks(ask: Callable[[Tensor, Tensor], Tensor]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Curious(Aggregator):
        def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
            return ask(gram, mask)

    gram, mask = torch.eye(4, dtype=torch.float64).expand(3, 4, 4), torch.ones(3, 4, dtype=torch.bool)
    with Watch() as watch:
        solve(gram, mask, Curious(), generator=torch.Generator())
    assert watch.waits != []


def test_the_watch_sees_copies() -> None:
    with Watch() as watch:
        torch.ones(2).to("meta")
        torch.empty(2, device="meta").copy_(torch.ones(2))
    assert len(watch.copies) == 2
