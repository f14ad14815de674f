"""The exchange: every element reaches exactly its owner, and bytes are counted as they are sent."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulated_ranks import SimulatedExchange, run_ranks

from bucketmoo_ds.comm.delivery import Delivery, Piece
from bucketmoo_ds.comm.exchange import ALIGNMENT, Exchange


@pytest.fixture
def alone() -> Iterator[Exchange]:
    """An exchange over gloo with a world of one."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=20)
    )
    yield Exchange()
    dist.destroy_process_group()


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, int, list[Piece], list[list[int]]]:
    """World size, elements of the bucket, pieces that partition it, and the sizes of each rank's targets."""
    world_size = draw(st.integers(1, 5))
    num_targets = draw(st.integers(1, 3))
    ends = [[0] * num_targets for _ in range(world_size)]
    pieces, position = [], 0
    runs = st.tuples(
        st.integers(1, 30), st.integers(0, world_size - 1), st.integers(0, num_targets - 1), st.sampled_from([0, 0, 3])
    )
    for numel, owner, target, gap in draw(st.lists(runs, min_size=1, max_size=10)):
        begin = ends[owner][target] + gap
        pieces.append(Piece(position, numel, owner, target, begin))
        ends[owner][target] = begin + numel
        position += numel
    return world_size, position, pieces, ends


@settings(deadline=None, max_examples=200)
@given(case=deliveries())
def test_every_element_reaches_its_owner(case: tuple[int, int, list[Piece], list[list[int]]]) -> None:
    """The routes of all ranks, run by hand."""
    world_size, numel, pieces, sizes = case
    exchanges = [SimulatedExchange(rank, world_size) for rank in range(world_size)]
    shard_numel = exchanges[0].shard_numel(numel)
    padded = torch.full((world_size * shard_numel,), float("nan"))
    padded[:numel] = torch.randperm(numel).float()
    everyone = [Delivery(exchange, pieces, shard_numel) for exchange in exchanges]
    targets = [[torch.full((size,), -1.0) for size in of_rank] for of_rank in sizes]
    written = [[torch.zeros(size) for size in of_rank] for of_rank in sizes]
    for source, sender in enumerate(everyone):
        shard = padded[source * shard_numel : (source + 1) * shard_numel]
        for owner, receiver in enumerate(everyone):
            sent = sender._outgoing[owner]
            received = receiver._incoming[source]
            assert sent == received, "both ends agree about what comes"
            for one in sent:
                target = slice(one.target_start, one.target_start + one.numel)
                targets[owner][one.target][target] = shard[one.start : one.start + one.numel]
                written[owner][one.target][target] += 1
    expected = [[torch.full((size,), -1.0) for size in of_rank] for of_rank in sizes]
    for piece in pieces:
        run = padded[piece.start : piece.start + piece.numel]
        expected[piece.owner][piece.target][piece.target_start : piece.target_start + piece.numel] = run
    for rank in range(world_size):
        for found, wanted, count in zip(targets[rank], expected[rank], written[rank], strict=True):
            assert torch.equal(found, wanted)
            assert (count <= 1).all()


@settings(deadline=None, max_examples=25)
@given(case=deliveries())
def test_start_and_finish_deliver(case: tuple[int, int, list[Piece], list[list[int]]]) -> None:
    """The same through `start` and `finish`, and with the bytes that were sent."""
    world_size, numel, pieces, sizes = case
    values = torch.randperm(numel).float()

    def rank(exchange: SimulatedExchange) -> list[torch.Tensor]:
        shard_numel = exchange.shard_numel(numel)
        padded = torch.full((world_size * shard_numel,), float("nan"))
        padded[:numel] = values
        targets = [torch.full((size,), -1.0, dtype=torch.float64) for size in sizes[exchange.rank]]
        delivery = Delivery(exchange, pieces, shard_numel)
        received = delivery.start(padded[exchange.rank * shard_numel : (exchange.rank + 1) * shard_numel])
        delivery.finish(received.wait(), targets)
        return targets

    found = run_ranks(world_size, rank)
    for piece in pieces:
        run = found[piece.owner][piece.target][piece.target_start : piece.target_start + piece.numel]
        assert torch.equal(run, values[piece.start : piece.start + piece.numel].double())
    assert sum(int((target >= 0).sum()) for targets in found for target in targets) == numel


def test_neighbouring_pieces_travel_as_one() -> None:
    pieces = [Piece(0, 5, 0, 0, 10), Piece(5, 4, 0, 0, 15), Piece(9, 3, 0, 1, 19), Piece(12, 4, 0, 1, 25)]
    delivery = Delivery(SimulatedExchange(0, 1), pieces, 16)
    assert delivery._outgoing == [[Piece(0, 9, 0, 0, 10), Piece(9, 3, 0, 1, 19), Piece(12, 4, 0, 1, 25)]]


@given(numel=st.integers(0, 10**7), world_size=st.integers(1, 64))
def test_shards_cover_the_bucket_with_little_padding(numel: int, world_size: int) -> None:
    size = SimulatedExchange(0, world_size).shard_numel(numel)
    assert size % ALIGNMENT == 0
    assert numel <= size * world_size < numel + world_size * (ALIGNMENT + 1)


def test_world_of_one_sends_nothing(alone: Exchange) -> None:
    assert (alone.rank, alone.world_size) == (0, 1)
    flat = torch.randn(24)
    assert torch.equal(alone.scatter(flat).wait(), flat.view(1, -1))
    gram = torch.randn(2, 3, 3, dtype=torch.float64)
    assert torch.equal(alone.all_gather_grams(gram.clone()), gram.unsqueeze(0))
    assert torch.equal(alone.all_to_all(flat, [24], [24]).wait(), flat)
    numbers = [0, -1, 2**63 - 1, -(2**63)]
    assert alone.gather_numbers(numbers) == [numbers]
    assert alone.gather_text("größe") == ["größe"]
    assert sum(alone.sent_bytes.values()) == 0


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_text_of_every_rank(texts: list[str]) -> None:
    texts = [text.rstrip("\0") for text in texts]
    found = run_ranks(len(texts), lambda exchange: exchange.gather_text(texts[exchange.rank]))
    assert found == [texts] * len(texts)


def test_text_is_cut_and_never_fails() -> None:
    """An error on its way to the other ranks must not be lost to a character: they would wait for ever."""
    alone = SimulatedExchange(0, 1)
    alone._gather = lambda mine: [mine]  # type: ignore[method-assign]
    assert alone.gather_text("a" * 2000) == ["a" * 1024]
    assert alone.gather_text("ä" * 2000, limit=5) == ["ää\N{REPLACEMENT CHARACTER}"]
    assert alone.gather_text("broken \ud800 name") == ["broken \\ud800 name"]
    assert alone.gather_text("") == [""]


@settings(deadline=None, max_examples=20)
@given(world_size=st.integers(2, 4), numel=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_simulated_scatter_hands_each_rank_its_slice(world_size: int, numel: int, seed: int) -> None:
    """What the engine's tests build on."""
    size = SimulatedExchange(0, world_size).shard_numel(numel)
    data = torch.randn(world_size, world_size * size, generator=torch.Generator().manual_seed(seed))
    found = run_ranks(world_size, lambda exchange: exchange.scatter(data[exchange.rank].clone()).wait())
    for rank, slices in enumerate(found):
        assert torch.equal(slices, data.view(world_size, world_size, size)[:, rank])
