"""What rules keep from window to window: alike on all ranks, taken by windows that end well, and in the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import pytest
import torch
from draw import SEED
from torch import Tensor
from unit.test_engine import Outcome, config, plan, simulate, table

from bucketmoo_ds import aggregate
from bucketmoo_ds.aggregate import base as registry
from bucketmoo_ds.aggregate.base import State, Stateful
from bucketmoo_ds.errors import ConfigError

SLOTS = [
    [[(0, 3), (1, 2)], [(2, 4), (0, 1)]],
    [[(1, 3), (3, 2)], [(3, 4), (1, 1)]],
    [[(3, 1), (0, 2)], [(2, 2), (1, 5)]],
]


@dataclasses.dataclass(frozen=True)
class Remembering(Stateful):
    """Keeps a tensor of each shape, so that what comes next depends on all that was."""

    def start(self, languages: int) -> State:
        each = torch.arange(1.0, languages + 1.0, dtype=torch.float64)
        return {"windows": torch.zeros((), dtype=torch.float64), "lengths": each, "cosines": torch.outer(each, each)}

    def step(self, gram: Tensor, mask: Tensor, state: State, generator: torch.Generator) -> tuple[Tensor, State]:
        assert {name: each.shape for name, each in state.items()} == {
            "windows": gram.shape[:1], "lengths": gram.shape[:2], "cosines": gram.shape
        }  # fmt: skip
        lengths = 0.3 * state["lengths"] + gram.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
        cosines = 0.3 * state["cosines"] + gram
        raw = mask * (lengths + cosines.square().sum(-1) + state["windows"].unsqueeze(-1))
        weights = raw / raw.sum(-1, keepdim=True)
        return weights, {"windows": state["windows"] + 1.0, "lengths": lengths, "cosines": cosines}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTRY, "remembering", Remembering)


def windows(world_size: int = 2, slots: Any = SLOTS) -> list[Any]:
    return [table([row[:world_size] for row in rows], seed=SEED + number) for number, rows in enumerate(slots)]


def memory(outcome: Outcome) -> dict[str, Any]:
    return json.loads(json.dumps(outcome.moo.state_dict()["memory"]))


SETTINGS = [{"aggregator": "remembering"}, {"aggregator": "mgda", "weight_smoothing": 0.75}]


@pytest.mark.parametrize("changes", SETTINGS)
def test_ranks_and_modes_keep_the_same(changes: dict[str, Any]) -> None:
    """Block b is solved by rank b mod W, streaming by every rank; absent languages keep what they had."""
    blocks, one_step = plan("parameter"), windows(2, [rows[:1] for rows in SLOTS])
    deferred, other = simulate(one_step, config(mode="deferred", **changes), blocks)
    streaming, _ = simulate(one_step, config(mode="streaming", **changes), blocks)
    assert memory(deferred) == memory(other) == memory(streaming)
    for left, right in zip(deferred.resolutions, streaming.resolutions, strict=True):
        assert left.weights.equal(right.weights), f"BUCKETMOO_TEST_SEED={SEED}"
    first = aggregate.first_state(deferred.moo.resolver.aggregator, 4, changes.get("weight_smoothing", 0.0))
    for name, start in first.items():
        kept = torch.tensor(memory(deferred)[name], dtype=torch.float64)
        if start.ndim:  # language 2 came in the first window only in its second micro-step, which is not there
            assert kept[:, 2].equal(start[2].expand(len(kept), *start.shape[1:])), name
            assert (kept[:, [0, 1, 3]] != start[[0, 1, 3]]).flatten(1).any(1).all(), name


@pytest.mark.parametrize("changes", SETTINGS)
@pytest.mark.parametrize("mode", ["deferred", "streaming"])
def test_a_resumed_run_goes_on_to_the_bit(changes: dict[str, Any], mode: str) -> None:
    blocks, settings = plan("parameter"), config(mode=mode, **changes)
    all_windows = windows(2, [rows[:1] for rows in SLOTS] if mode == "streaming" else SLOTS)
    whole = simulate(all_windows, settings, blocks)[0]
    state = json.loads(json.dumps(simulate(all_windows[:2], settings, blocks)[1].moo.state_dict()))
    resumed = simulate(all_windows[2:], settings, blocks, state=state)[0]
    assert resumed.resolutions[-1].weights.equal(whole.resolutions[-1].weights), f"BUCKETMOO_TEST_SEED={SEED}"
    assert memory(resumed) == memory(whole)
    anew = simulate(all_windows[2:], settings, blocks)[0]
    assert not anew.resolutions[-1].weights.equal(whole.resolutions[-1].weights)


def test_another_world_size_takes_it_over() -> None:
    blocks, settings = plan("parameter"), config(mode="deferred", aggregator="remembering")
    state = simulate(windows(2)[:1], settings, blocks)[0].moo.state_dict()
    resumed = simulate(windows(1)[2:], settings, blocks, state=json.loads(json.dumps(state)))[0]
    assert resumed.moo.state_dict()["memory"].keys() == state["memory"].keys()


@pytest.mark.parametrize("mode", ["deferred", "streaming"])
def test_a_window_that_does_not_end_well_leaves_it_as_it_was(mode: str) -> None:
    blocks, settings = plan("parameter"), config(mode=mode, aggregator="remembering", weight_smoothing=0.5)
    good, bad = windows(2, [rows[:1] for rows in SLOTS[:2]])
    before = memory(simulate([good], settings, blocks)[0])
    bad[0][1].gradient["layers.1.a"][3] = float("inf")
    outcome = simulate([good, bad], settings, blocks)[0]
    assert outcome.resolutions[-1].nonfinite
    assert memory(outcome) == before


def test_an_abandoned_window_leaves_it_as_it_was() -> None:
    blocks, settings = plan("parameter"), config(mode="streaming", aggregator="remembering")
    good = windows(2, [SLOTS[0][:1]])[0]
    outcomes = simulate([good], settings, blocks)
    before = memory(outcomes[0])
    moo = outcomes[0].moo
    moo.resolver.memory.take([0], [1], moo.resolver.memory.of([1], [2]))
    moo.abandon()
    moo.resolver.memory.commit()
    assert memory(outcomes[0]) == before


def test_what_another_rule_kept_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    blocks = plan("parameter")
    state = simulate(windows(1)[:1], config(aggregator="remembering"), blocks)[0].moo.state_dict()
    with caplog.at_level(logging.WARNING):
        fresh = simulate(windows(1)[1:2], config(weight_smoothing=0.5), blocks, state=state)[0]
    assert "of another aggregator" in caplog.text
    anew = simulate(windows(1)[1:2], config(weight_smoothing=0.5), blocks)[0]
    assert fresh.resolutions[0].weights.equal(anew.resolutions[0].weights)
    swapped = {**state, "memory": state["memory"] | {"languages": ["l1", "l0", "l2", "l3"]}}
    with pytest.raises(ConfigError, match="same languages in the same order"):
        simulate(windows(1)[1:2], config(aggregator="remembering"), blocks, state=swapped)


def test_a_call_without_a_state_is_a_first_window() -> None:
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    gram, mask = rows @ rows.mT, torch.ones(3, 4, dtype=torch.bool)
    rule = aggregate.create("remembering")
    state = {name: each.expand(3, *each.shape) for name, each in rule.start(4).items()}
    found = aggregate.solve(gram, mask, rule, state=state, generator=torch.Generator())
    assert found.equal(aggregate.weights(gram, "remembering"))
    assert state["windows"].tolist() == [1.0] * 3
    again = aggregate.solve(gram, mask, rule, state=state, generator=torch.Generator())
    assert not again.equal(found), f"BUCKETMOO_TEST_SEED={SEED}"


def test_blocks_without_a_choice_and_languages_masked_out_keep_their_state() -> None:
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64)
    gram = rows @ rows.mT
    gram[1, 0, 0] = float("nan")
    mask = torch.tensor([[True, True, True], [True, True, True], [False, True, False], [True, False, True]])
    rule = aggregate.create("remembering")
    first = {name: each.expand(4, *each.shape) for name, each in rule.start(3).items()}
    state = dict(first)
    aggregate.solve(gram, mask, rule, state=state, generator=torch.Generator())
    taken = torch.tensor([[True, True, True], [False] * 3, [False] * 3, [True, False, True]])
    assert (state["windows"] != first["windows"]).tolist() == [True, False, False, True]
    assert (state["lengths"] != first["lengths"]).equal(taken)
    assert (state["cosines"] != first["cosines"]).equal(taken.unsqueeze(1) & taken.unsqueeze(2))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_smoothed_weights_are_the_moving_average(share: float) -> None:
    """By hand: what is kept is in units of an equal share, and starts at averaging."""
    generator = torch.Generator().manual_seed(SEED)
    rule, state = aggregate.create("mgda"), {"weights": torch.ones(2, 3, dtype=torch.float64)} if share else {}
    average = torch.ones(2, 3, dtype=torch.float64)
    for present in ([0, 1, 2], [0, 2], [0, 1, 2], [1, 2]):
        rows = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        mask[:, present] = True
        how = {"generator": torch.Generator()}
        plain = aggregate.solve(rows @ rows.mT, mask, rule, **how)
        found = aggregate.solve(rows @ rows.mT, mask, rule, weight_smoothing=share, state=state, **how)
        moved = share * average + (1.0 - share) * plain * len(present)
        average = torch.where(mask, moved, average)
        wanted = torch.where(mask, average / len(present), 0.0)
        # A handful of roundings of numbers of at most 3.
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-14, msg=f"BUCKETMOO_TEST_SEED={SEED}")
