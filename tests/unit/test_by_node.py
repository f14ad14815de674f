"""The exchange in two stages: what ranks receive and count, and windows against the float64 reference, on 4 to 9 ranks
that are threads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulated_ranks import SimulatedExchange
from unit.test_engine import assert_equals_reference, config, drive, plan, table
from unit.threaded_ranks import run_ranks

from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import CHOICES
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import GRANULARITIES
from bucketmoo_ds.plan.choices import ranks_per_node

NODES = [(4, 2), (6, 2), (6, 3), (8, 4), (9, 3)]  # W, L


@settings(deadline=None, max_examples=examples(15))
@given(
    nodes=st.sampled_from(NODES),
    shard=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_each_rank_gets_its_slice_of_every_nodes_sum(
    nodes: tuple[int, int], shard: int, dtype: torch.dtype, seed: int
) -> None:
    world_size, inside = nodes
    # Whole numbers, whose sums are exact in both dtypes.
    data = torch.randint(-8, 9, (world_size, world_size * shard), generator=torch.Generator().manual_seed(seed))

    def body() -> tuple[torch.Tensor, dict[str, int], dict[str, int]]:
        exchange = Exchange(ranks_per_node=inside)
        received = exchange.scatter_by_node(data[exchange.rank].to(dtype)).wait()
        return received, dict(exchange.sent_bytes), dict(exchange.sent_between_nodes)

    count = world_size // inside
    sums = data.view(count, inside, world_size, shard).sum(dim=1)
    numel = world_size * shard * dtype.itemsize
    for rank, (received, sent, between) in enumerate(run_ranks(world_size, body)):
        assert torch.equal(received.long(), sums[:, rank])
        del sent["all_gather (control)"], between["all_gather (control)"]
        # (L-1)/L N inside, then (1/L - 1/W) N across: (W-1)/W N in all.
        across = numel // inside // count * (count - 1)
        assert sent == {"reduce_scatter (node)": numel // inside * (inside - 1), "all_to_all (nodes)": across}
        assert sum(sent.values()) == numel // world_size * (world_size - 1)
        assert between == {"reduce_scatter (node)": 0, "all_to_all (nodes)": across}


@pytest.mark.parametrize(("world_size", "inside"), NODES)
def test_what_leaves_the_node_is_counted(world_size: int, inside: int) -> None:
    def body() -> dict[str, int]:
        exchange = Exchange(ranks_per_node=inside)
        before = dict(exchange.sent_between_nodes)
        exchange.scatter(torch.zeros(world_size * 8)).wait()
        exchange.all_gather(torch.zeros(8)).wait()
        exchange.all_gather_grams(torch.zeros(2, 3, 3, dtype=torch.float64))
        exchange.all_to_all_grams(torch.zeros(world_size, 5, 3, 3, dtype=torch.float64))
        exchange.all_to_all(torch.zeros(world_size), [1] * world_size, [1] * world_size).wait()
        exchange.gather_numbers([1, 2])
        return {name: sent - before.get(name, 0) for name, sent in exchange.sent_between_nodes.items()}

    elsewhere = world_size - inside
    for found in run_ranks(world_size, body):
        assert found == {
            "all_to_all": 8 * 4 * elsewhere,
            "all_gather (combined)": 8 * 4 * elsewhere,
            "all_gather (Grams)": 18 * 8 * elsewhere,
            "all_to_all (Grams)": 45 * 8 * elsewhere,
            "all_to_all (combined)": 4 * elsewhere,
            "all_gather (control)": 2 * 8 * elsewhere,
        }


def test_replicas_that_share_a_node_are_not_elsewhere() -> None:
    """8 ranks, 4 replicas of 2, 4 ranks a node: of the three other replicas' ranks one is on the own node."""

    def body() -> dict[str, int]:
        exchange = Exchange(ranks_per_node=4)
        replicas = [dist.new_group([position, *range(position + 2, 8, 2)]) for position in range(2)]
        exchange.all_gather(torch.zeros(5), replicas[exchange.rank % 2]).wait()
        return {"sent": exchange.sent_bytes["all_gather (combined)"]} | exchange.sent_between_nodes

    for found in run_ranks(8, body):
        assert found["sent"] == 3 * 5 * 4
        assert found["all_gather (combined)"] == 2 * 5 * 4


@pytest.mark.parametrize(
    ("world_size", "told"), [(6, [2, 2, 2, 3, 3, 3]), (6, [4] * 4 + [2] * 2), (4, [3] * 4), (4, [4] * 4), (4, [1] * 4)]
)
def test_ranks_that_form_no_nodes_exchange_flat(world_size: int, told: list[int]) -> None:
    """Nodes of different sizes, on which torchrun's LOCAL_WORLD_SIZE differs, must not end in different groups."""

    def body() -> tuple[int, torch.Size]:
        exchange = Exchange(ranks_per_node=told[dist.get_rank()])
        return exchange.nodes, exchange.scatter(torch.zeros(world_size * 8)).wait().shape

    assert run_ranks(world_size, body) == [(1, torch.Size([world_size, 8]))] * world_size


@st.composite
def windows_of_nodes(draw: st.DrawFn) -> tuple[int, int, bool, list[list[list[tuple[int, int]]]]]:
    """W, L, whether ranks add up locally, and two windows of [M][W] slots. Most nodes have one language in a
    micro-step, so that some micro-steps go by node and some do not; some ranks, and some nodes, have no target token.
    """
    world_size, inside = draw(st.sampled_from(NODES[:4]))
    once_a_window, micro_steps = draw(st.booleans()), draw(st.integers(1, 3))
    tokens = st.sampled_from([0, 1, 5, 64, 64, 64, 300])

    def row() -> list[int]:
        languages = [draw(st.integers(0, 3)) for _ in range(world_size // inside)]
        languages = [language for language in languages for _ in range(inside)]
        if draw(st.integers(0, 3)) == 0:
            languages[draw(st.integers(0, world_size - 1))] = draw(st.integers(0, 3))
        return languages

    windows = []
    for _ in range(2):
        first = row()
        rows = [first if once_a_window else row() for _ in range(micro_steps)]
        slots = [[(language, draw(tokens)) for language in languages] for languages in rows]
        if not any(count for each in slots for _, count in each):
            slots[0][0] = (slots[0][0][0], 7)
        windows.append(slots)
    return world_size, inside, once_a_window, windows


@settings(deadline=None, max_examples=examples(10))
@given(
    case=windows_of_nodes(),
    seed=st.integers(0, 2**32),
    aggregator=st.sampled_from(["mean", "mgda", "upgrad"]),
    granularity=st.sampled_from(sorted(GRANULARITIES)),
    weighting=st.sampled_from(CHOICES["weighting"]),
    row_storage=st.sampled_from(["float32", "host"]),
    overlap=st.booleans(),
)
def test_equals_the_reference(case: Any, seed: int, granularity: str, overlap: bool, **options: str) -> None:
    world_size, inside, once_a_window, slots = case
    windows = [table(one, seed + number) for number, one in enumerate(slots)]
    chosen = config(granularity=granularity, **options)

    def body() -> Any:
        how = {"once_a_window": once_a_window, "overlap": overlap}
        return drive(Exchange(ranks_per_node=inside), windows, chosen, plan(granularity), **how)

    outcomes = run_ranks(world_size, body)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    assert_equals_reference(outcomes, windows, chosen)
    moo = outcomes[0].moo
    by_node = [all(one_language(row, inside)) for window in slots for row in window]
    assert moo.counters["flat_micro_steps"] == by_node.count(False)
    if not once_a_window:
        assert ("all_to_all (nodes)" in moo.exchange.sent_bytes) == any(by_node)
        assert ("all_to_all" in moo.exchange.sent_bytes) == (not all(by_node))


def one_language(row: list[tuple[int, int]], inside: int) -> list[bool]:
    nodes = [row[first : first + inside] for first in range(0, len(row), inside)]
    return [len({language for language, tokens in node if tokens}) <= 1 for node in nodes]


def test_languages_mixed_in_a_node_are_refused_where_two_stages_were_asked_for() -> None:
    chosen = config(exchange="two_stage")
    windows = [table([[(0, 5), (0, 5), (1, 5), (2, 5)]], seed=1)]
    for error in run_ranks(4, lambda: drive(Exchange(ranks_per_node=2), windows, chosen, plan())):
        assert isinstance(error, LanguageError)
        assert "ranks_per_node=2" in str(error)
        assert 'use "auto"' in str(error)


def test_two_stages_without_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'exchange = "two_stage".*use "auto"'):
        BucketMOO(
            config(exchange="two_stage"),
            plan(),
            SimulatedExchange(0, 4),
            print,
            micro_steps=lambda: 1,
            once_a_window=False,
        )


@pytest.mark.parametrize(
    ("world_size", "setting", "environment", "expected"),
    [
        (8, 0, None, 8),
        (8, 0, "4", 4),
        (8, 2, "4", 2),
        (8, 0, "3", 1),  # such nodes cannot be alike
        (2, 0, "8", 2),  # two of a node's eight
        (2, 8, None, 2),
    ],
)
def test_ranks_of_a_node(
    monkeypatch: pytest.MonkeyPatch, world_size: int, setting: int, environment: str | None, expected: int
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if environment:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", environment)
    chosen = config(ranks_per_node=setting)
    assert ranks_per_node(chosen, world_size) == expected
    asked = dataclasses.replace(chosen, exchange="two_stage")
    if 1 < expected < world_size:
        assert ranks_per_node(asked, world_size) == expected
    else:
        with pytest.raises(ConfigError, match=f"{world_size} ranks with .* a node are not several nodes"):
            ranks_per_node(asked, world_size)


def test_a_node_that_is_not_full_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ranks_per_node = 3: 8 ranks are not whole nodes .* leave it out"):
        ranks_per_node(config(ranks_per_node=3), 8)
