"""Weights that are solved in one of R windows: what the others do with them, against the float64 reference."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from draw import SEED
from torch import Tensor
from unit.test_engine import Outcome, Table, config, plan, simulate, table

from bucketmoo_ds import reference
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import BlockPlan

# Language 3 comes in the second window, of which no weight is known; language 0 is absent from the third.
SLOTS = [
    [[(0, 3), (1, 2), (2, 1)], [(2, 4), (0, 1), (1, 2)]],
    [[(1, 3), (3, 2), (0, 4)], [(3, 4), (1, 1), (2, 2)]],
    [[(2, 1), (1, 2), (1, 0)], [(2, 2), (1, 5), (2, 3)]],
    [[(0, 2), (1, 3), (2, 2)], [(3, 2), (1, 1), (0, 3)]],
]
WORLD_SIZE = 3


def windows(micro_steps: int) -> list[Table]:
    return [table(rows[:micro_steps], seed=SEED + number) for number, rows in enumerate(SLOTS)]


def check(outcomes: list[Outcome], all_windows: list[Table], settings: BucketMOOConfig, blocks: BlockPlan) -> None:
    """Every window's combined gradient is the reference's with the weights that are said."""
    solved: Tensor | None = None
    present: tuple[int, ...] = ()
    for number, window in enumerate(all_windows):
        resolution = outcomes[0].resolutions[number]
        if resolution.fresh:
            solved, present = resolution.weights, resolution.present
        assert solved is not None
        for language in range(4):
            here = language in resolution.present
            known = solved[:, language] * len(present) if language in present else torch.ones(len(solved)).double()
            wanted = known / len(resolution.present) if here else torch.zeros(len(solved)).double()
            # A product and a quotient.
            torch.testing.assert_close(resolution.weights[:, language], wanted, rtol=1e-14, atol=0.0)
        check_gradients(outcomes, number, window, settings, blocks)


def check_gradients(
    outcomes: list[Outcome], number: int, window: Table, settings: BucketMOOConfig, blocks: BlockPlan
) -> None:
    resolution = outcomes[0].resolutions[number]
    members: dict[int, list[str]] = {}
    for index, block in enumerate(blocks.block_of):
        members.setdefault(block, []).append(blocks.parameters[index].name)
    micros = [micro for row in window for micro in row]
    expected: dict[str, Tensor] = {}
    for block, parameters in members.items():
        found, _ = reference.resolve_window(
            micros,
            {"it": parameters},
            micro_steps=len(window),
            aggregator=lambda gram, block=block: resolution.weights[block, list(resolution.present)],
            weighting=settings.weighting,
        )
        expected |= found
    for bucket, of in enumerate(blocks.buckets):
        whole = torch.cat([outcome.shards[number][bucket] for outcome in outcomes])[: of.numel].double()
        reals = torch.cat([expected[blocks.parameters[index].name].flatten() for index in of.parameters])
        # float32 rows: see test_engine.py.
        assert float((whole - reals).norm() / reals.norm()) <= 1e-6, f"BUCKETMOO_TEST_SEED={SEED}, window {number}"


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "streaming"},
        {"mode": "deferred", "weighting": "token", "row_storage": "host"},
        {"granularity": "model", "aggregator": "gradvac", "weight_smoothing": 0.5},
    ],
    ids=str,
)
def test_the_windows_between_use_the_weights(micro_steps: int, changes: dict[str, Any]) -> None:
    if micro_steps > 1 and changes.get("mode") == "streaming":
        changes = changes | {"mode": "auto"}
    blocks, settings = plan(changes.get("granularity", "parameter")), config(gram_every=3, **changes)
    outcomes = simulate(windows(micro_steps), settings, blocks)
    assert [each.fresh for each in outcomes[0].resolutions] == [True, False, False, True]
    assert len({str(outcome.resolutions[2].weights) for outcome in outcomes}) == 1
    check(outcomes, windows(micro_steps), settings, blocks)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_resumed_run_goes_on_in_between(micro_steps: int) -> None:
    blocks, settings = plan("parameter"), config(gram_every=3, aggregator="upgrad")
    whole = simulate(windows(micro_steps), settings, blocks)[0]
    state = json.loads(json.dumps(simulate(windows(micro_steps)[:2], settings, blocks)[2].moo.state_dict()))
    resumed = simulate(windows(micro_steps)[2:], settings, blocks, state=state)[0]
    for mine, theirs in zip(resumed.resolutions, whole.resolutions[2:], strict=True):
        assert (mine.fresh, mine.window) == (theirs.fresh, theirs.window)
        assert mine.weights.equal(theirs.weights)
        assert mine.gram.equal(theirs.gram)
    assert all(resumed.shards[-1][bucket].equal(whole.shards[-1][bucket]) for bucket in whole.shards[-1])
    with pytest.raises(ConfigError, match="same languages in the same order"):
        simulate(windows(1)[2:], config(gram_every=3, languages=["l1", "l0", "l2", "l3"]), blocks, state=state)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_what_is_not_finite_is_found_without_grams(micro_steps: int) -> None:
    """A window between is skipped; one that was to be solved leaves that to the next."""
    blocks, settings = plan("parameter"), config(gram_every=2)
    bad = windows(micro_steps)[1]
    bad[0][1].gradient["layers.1.a"][3] = math.inf  # of language 3
    names = {("l3", bucket.name) for bucket in blocks.buckets if "layers.1.a" in _names(blocks, bucket)}
    found = simulate([windows(micro_steps)[0], bad, windows(micro_steps)[3]], settings, blocks)
    for outcome in found:
        assert set(outcome.resolutions[1].nonfinite) == names
        assert [each.fresh for each in outcome.resolutions] == [True, False, True]
        assert not outcome.resolutions[2].nonfinite
    found = simulate([bad, windows(micro_steps)[0], windows(micro_steps)[3]], settings, blocks)
    assert [each.fresh for each in found[0].resolutions] == [True, True, False]


def _names(blocks: BlockPlan, bucket: Any) -> list[str]:
    return [blocks.parameters[index].name for index in bucket.parameters]


def test_between_nothing_is_kept_and_no_gram_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks span buckets and the rule is not cheap."""
    calls: list[str] = []
    for name in ("_gram", "_accumulate_gram"):
        plain = getattr(BucketMOO, name)
        noted = lambda moo, *given, name=name, plain=plain: calls.append(name) or plain(moo, *given)  # noqa: E731
        monkeypatch.setattr(BucketMOO, name, noted)
    blocks, settings = plan("model"), config(gram_every=100, aggregator="cagrad")
    first = simulate(windows(1)[:1], settings, blocks)
    calls_of_first = len(calls)
    assert calls_of_first
    state = json.loads(json.dumps(first[0].moo.state_dict()))
    rest = simulate(windows(1)[1:], settings, blocks, state=state)
    assert len(calls) == calls_of_first
    assert rest[0].moo.row_bytes == 0 < first[0].moo.row_bytes
