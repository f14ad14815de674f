"""The peers compute what the ops compute: a ratio between two different things would say nothing."""

from __future__ import annotations

import pytest
import torch

from bucketmoo_ds import ops
from bucketmoo_ds.apps.bench import peers
from bucketmoo_ds.apps.bench.cases import WHOLE, Case
from bucketmoo_ds.apps.bench.inputs import Inputs, Store

CPU = torch.device("cpu")
# float32 and bf16 products of a few thousand elements, on Grams of the order 1 (relative to their diagonal).
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture
def store() -> Store:
    seed = torch.seed()
    print(f"seed {seed}")
    return Store(CPU, seed % 2**31)


def case_of(op: str, dtype: str, *, cut: bool = False, count: int = 4) -> Case:
    return Case(op, dtype, count, 3200, 100, 5) if cut else Case(op, dtype, count, 3001, WHOLE, 1)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["gram", "accumulate_gram"])
def test_torch_gram_is_the_gram(store: Store, op: str, dtype: str, cut: bool) -> None:
    inputs = store.inputs(case_of(op, dtype, cut=cut))
    found = peers.peers(inputs, compiled=True)["torch"]()
    if op == "accumulate_gram":
        inputs = store.inputs(case_of("gram", "fp32", cut=cut))  # the rows that torch has just added to
    expected = inputs.call("reference")()
    assert isinstance(found, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert relative(found, expected) <= ROUNDING[dtype if op == "gram" else "fp32"]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_combine_is_the_combination(store: Store, dtype: str, cut: bool) -> None:
    inputs = store.inputs(case_of("combine", dtype, cut=cut))
    found = peers.peers(inputs, compiled=True)["torch"]()
    inputs.call("reference")()
    assert isinstance(found, torch.Tensor)
    assert found.dtype == inputs.out.dtype
    assert relative(found, inputs.out) <= ROUNDING[dtype]


@pytest.mark.parametrize("cut", [False, True])
def test_peers_of_resolve_are_nearly_as_short(store: Store, cut: bool) -> None:
    """Frank-Wolfe stops short of the optimum, so that norms are compared, not vectors."""
    inputs = store.inputs(case_of("resolve", "fp32", cut=cut))
    inputs.call("reference")()
    found = peers.peers(inputs, compiled=True)
    assert set(found) == ({"torch"} if cut else {"torch", "torchjd"})
    for name, call in found.items():
        combined = call()
        assert isinstance(combined, torch.Tensor)
        assert 0.999 <= float(combined.norm() / inputs.out.norm()) <= 1.02, name


def test_separate_calls_are_resolve_to_the_bit(store: Store) -> None:
    inputs = store.inputs(case_of("resolve", "bf16", cut=True))
    inputs.call("reference")()
    expected = inputs.out.clone()
    inputs.out.fill_(float("nan"))
    inputs.separate_call("reference")()
    assert torch.equal(inputs.out, expected)


def test_frank_wolfe_approaches_the_optimum(store: Store) -> None:
    inputs = store.inputs(Case("min_norm", "fp64", 6, 0, WHOLE, 40))
    assert torch.equal(inputs.gram, inputs.gram.mT)
    optimal, _ = ops.min_norm(inputs.gram, inputs.mask, backend="reference")
    for weights in (peers.frank_wolfe(inputs.gram), peers.torchjd_weights(inputs.gram)):
        assert torch.allclose(weights.sum(1), torch.ones(40, dtype=torch.float64))
        assert bool((weights >= 0).all())
        excess = length(inputs, weights) / length(inputs, optimal) - 1
        assert float(excess.min()) >= -1e-9, "shorter than the shortest"
        # A step below 1e-3 ends it: that leaves a percent in most blocks, and much more in a few.
        assert float(excess.median()) <= 0.05
    # Equal rows: the segment from the weights to a vertex has length 0.
    assert not peers.frank_wolfe(torch.ones(1, 3, 3, dtype=torch.float64)).isnan().any()


def test_rows_are_shared_between_cases_and_never_alike(store: Store) -> None:
    few = store.inputs(case_of("gram", "fp32", count=2))
    many = store.inputs(case_of("combine", "fp32", count=6))
    assert [row.data_ptr() for row in few.rows] == [row.data_ptr() for row in many.rows[:2]]
    gram = ops.gram(many.rows, many.spans, many.cells, 1, backend="reference")[0]
    cosines = gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt())
    # Independent normal values: 3001 of them have a cosine of 1/sqrt(3001) = 0.018, six of those are 0.11.
    assert float((cosines - torch.eye(6)).abs().max()) < 0.11
    longer = store.inputs(Case("gram", "fp32", 2, 40_000, WHOLE, 1))
    assert longer.rows[0].numel() == 40_000
    shorter = store.inputs(Case("gram", "fp32", 2, 1000, WHOLE, 1))
    assert shorter.rows[0].untyped_storage().nbytes() == 4000, "a much longer row is given back"


def test_incoming_gradients_are_not_the_rows(store: Store) -> None:
    for dtype in ("fp32", "bf16"):
        inputs = store.inputs(case_of("accumulate_gram", dtype))
        assert not {row.data_ptr() for row in inputs.rows} & {row.data_ptr() for row in inputs.incoming}
        assert {row.dtype for row in inputs.rows} == {torch.float32}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def length(inputs: Inputs, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bi,bij,bj->b", weights, inputs.gram, weights)
