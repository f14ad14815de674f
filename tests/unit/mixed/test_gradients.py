"""`.grad` and Grams of random small models, against rows computed language by language."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.mixed import stack
from unit.mixed.stack import IN_FLOAT32, KINDS, LANGUAGES, Shape, draw_batch, rows_of

from bucketmoo_ds.adapters.mixed import products


@st.composite
def shapes(draw: Any, kinds: tuple[str, ...]) -> Shape:
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    pooled = draw(st.booleans())
    return Shape(
        kinds=tuple(chosen),
        tied=draw(st.booleans()),
        positions=draw(st.sampled_from(("none", "shared", "each"))),
        pooled=pooled,
        padded=draw(st.booleans()),
        reentrant=draw(st.sampled_from((None, None, False, True))),
    )


def check(shape: Shape, dtype: torch.dtype, packed: bool, seed: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = stack.made(shape, dtype, seed)
    plain = copy.deepcopy(model)
    batch = draw_batch(generator, packed and not shape.pooled, shape.pooled)
    session = stack.register(model)
    weights = torch.rand(len(session.plan.blocks), len(LANGUAGES), generator=generator, dtype=torch.float64)
    stack.hand(session, weights)
    rows = [rows_of(plain, batch.only(each), seed) for each in range(len(LANGUAGES))]

    torch.manual_seed(seed)
    loss = model(**batch.inputs, language=batch.language)
    loss.backward()
    torch.manual_seed(seed)
    assert loss.item() == plain(**batch.inputs).item()
    parts = {
        name: torch.stack([weights[block, each] * rows[each][name].double() for each in range(len(LANGUAGES))])
        for name, block in stack.block_of(session).items()
    }
    largest = max(each.abs().sum(0).max() for each in parts.values())
    for name, each in parts.items():
        got = model.get_parameter(name).grad
        assert got is not None
        assert (got.double() - each.sum(0)).abs().max() <= tolerance * largest, name
    session.end_window()
    expected, square = stack.expected_grams(session, plain, batch, seed)
    assert ((stack.grams(session) - expected).abs() <= 4 * tolerance * square.clamp(min=1e-6 * square.max())).all()


# A hundred products at most make an entry, each rounded to 1e-16 of the largest.
@settings(deadline=None, max_examples=20)
@given(
    shape=shapes(tuple(KINDS)),
    packed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    pairs=st.booleans(),
    at_once=st.sampled_from((200, products.AT_ONCE)),
)
def test_float64(shape: Shape, packed: bool, seed: int, pairs: bool, at_once: int) -> None:
    """Also of Grams, whichever way they are taken, in whichever pieces."""
    with mock.patch.multiple(products, pairs_are_cheaper=lambda *_: pairs, AT_ONCE=at_once):
        check(shape, torch.float64, packed, seed, 1e-12)


# Rows have the roundings of the forward pass, which is bit for bit the same, so that only sums differ: of a hundred
# numbers at most, some of which cancel, each rounded to 6e-8.
@settings(deadline=None, max_examples=12)
@given(shape=shapes((*KINDS, *IN_FLOAT32)), packed=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_float32(shape: Shape, packed: bool, seed: int) -> None:
    check(shape, torch.float32, packed, seed, 5e-7)


@settings(deadline=None, max_examples=10)
@given(shape=shapes(tuple(KINDS)), packed=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_mean(shape: Shape, packed: bool, seed: int) -> None:
    """With weighting "token" it is the plain run, with "language" the mean of the languages' means; also on windows
    without Grams."""
    model = stack.made(shape, torch.float64, seed)
    batch = draw_batch(torch.Generator().manual_seed(seed), packed and not shape.pooled, shape.pooled)
    rows = [rows_of(model, batch.only(each), seed) for each in range(len(LANGUAGES))]
    whole = rows_of(model, batch.inputs, seed)
    for weighting, expected in (
        ("token", whole),
        ("language", {name: sum(each[name] for each in rows) / len(rows) for name in whole}),
    ):
        copied = copy.deepcopy(model)
        session = stack.register(copied, aggregator="mean", weighting=weighting, gram_every=2)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.0)
        largest = max(each.abs().max() for each in whole.values())
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(seed)
            copied(**batch.inputs, language=batch.language).backward()
            for name, parameter in expected.items():
                got = copied.get_parameter(name).grad
                assert got is not None
                assert (got - parameter).abs().max() <= 1e-12 * largest, name
            optimizer.step()
        assert session.last is not None
        assert session.last.target_tokens == tuple(batch.counts().tolist())
