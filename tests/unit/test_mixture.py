"""Sampling that moves with the Grams of training: by the formula, alike on all ranks, and resumed to the row."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from draw import SEED, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulated_ranks import run_ranks
from unit.test_engine import config, flat_of, plan, slot_of, table

from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.mixture import Mixture
from bucketmoo_ds.data.sampler import LanguageBatchSampler
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.pipeline.engine import BucketMOO

NAMES = ("de", "fr", "ko", "sw")
DOGE = {"adapt": "doge", "rate": 0.5}


def options(**changes: Any) -> dict[str, Any]:
    return BucketMOOConfig(languages=NAMES, schedule=DOGE | changes).schedule


def mixture(places: int = 8, seed: int = SEED, **changes: Any) -> Mixture:
    return Mixture(NAMES, np.array([4.0, 2.0, 1.0, 1.0]), places, seed, options(**changes))


def some_gram(generator: torch.Generator) -> list[list[float]]:
    rows = torch.randn(4, 5, generator=generator, dtype=torch.float64) + torch.randn(5, generator=generator)
    return (rows @ rows.T).tolist()


def test_it_starts_at_the_shares_of_the_temperature() -> None:
    p = mixture(mix=1e-9).probabilities
    assert list(p) == list(NAMES)
    np.testing.assert_allclose(list(p.values()), [0.5, 0.25, 0.125, 0.125], rtol=1e-6)
    assert mixture(probe="fr").probabilities["fr"] == 0.0


@settings(deadline=None, max_examples=examples(20))
@given(seed=st.integers(0, 2**32), probe=st.sampled_from([None, "ko"]), noisy=st.sets(st.integers(0, 3)))
def test_it_moves_by_the_formula(seed: int, probe: str | None, noisy: set[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    rate, clip, mix = 0.3, 0.4, 0.1
    moved = mixture(probe=probe, rate=rate, clip=clip, mix=mix)
    logs = np.log([4.0, 2.0, 1.0, 1.0])
    own = NAMES.index(probe) if probe else None
    sampled = [each for each in range(4) if each != own]
    for present in ([0, 1, 2, 3], [0, 2, 3]):
        gram = np.array(some_gram(generator))
        there = [each for each in present if each != own]
        size = np.mean([gram[each, each] for each in there])
        scores = []
        for each in there:
            judges = [own] if own is not None else [j for j in there if j != each or each not in noisy]
            scores.append(np.clip(np.mean(gram[each, judges]) / size, -clip, clip))
        logs[there] += rate * (np.array(scores) - np.mean(scores))
        moved.move(gram.tolist(), present, noisy)
    even = np.exp(logs[sampled]) / np.exp(logs[sampled]).sum()
    expected = (1 - mix) * even + mix / len(sampled)
    found = [moved.probabilities[NAMES[each]] for each in sampled]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)  # rounded to 1e-12 a window
    # The scale of a loss is no reason to sample it.
    one, other = mixture(), mixture()
    one.move(gram.tolist(), [0, 1, 2, 3], ())
    other.move((1e6 * gram).tolist(), [0, 1, 2, 3], ())
    np.testing.assert_allclose(list(one.probabilities.values()), list(other.probabilities.values()), rtol=0, atol=2e-12)


def test_what_helps_the_others_or_the_probe_is_sampled_more() -> None:
    # de and fr agree, sw is against both; ko is like sw.
    rows = torch.tensor([[1.0, 0.2], [1.0, -0.2], [-0.4, 1.0], [-0.6, 1.0]])
    gram = (rows @ rows.T).tolist()
    helping, steered = mixture(), mixture(probe="ko")
    for _ in range(50):
        helping.move(gram, [0, 1, 2, 3], [0, 1, 2, 3])
        steered.move(gram, [0, 1, 2, 3], [0, 1, 2, 3])
    assert steered.probabilities["sw"] > 0.9
    assert steered.probabilities["fr"] >= 0.05 / 3, "mix keeps everybody in"
    before = mixture().probabilities
    assert helping.probabilities["sw"] / before["sw"] < helping.probabilities["de"] / before["de"]


def test_a_window_that_tells_nothing_moves_nothing() -> None:
    for gram, present in (
        (np.zeros((4, 4)), [0, 1, 2, 3]),
        (np.eye(4), [2]),
        (np.full((4, 4), math.nan), [0, 1]),
    ):
        moved = mixture()
        moved.move(gram.tolist(), present, ())
        assert moved.probabilities == mixture().probabilities
    steered = mixture(probe="ko")
    steered.move(np.ones((4, 4)).tolist(), [0, 1, 3], ())
    assert steered.probabilities == mixture(probe="ko").probabilities, "no probe in the window"


@settings(deadline=None, max_examples=examples(20))
@given(places=st.integers(2, 12), probe=st.sampled_from([None, "sw"]), seed=st.integers(0, 2**32))
def test_windows_are_full_cover_all_they_can_and_follow_the_shares(places: int, probe: str | None, seed: int) -> None:
    drawn = mixture(places, seed, probe=probe)
    generator = torch.Generator().manual_seed(seed)
    drawn.move(some_gram(generator), [0, 1, 2, 3], ())
    free = places - (probe is not None)
    counts = np.array([drawn.counts(0, window) for window in range(60)])
    assert (counts.sum(1) == places).all()
    if probe:
        assert (counts[:, 3] == 1).all()
    others = counts[:, :3] if probe else counts
    if free >= others.shape[1]:
        assert (others >= 1).all()
    else:
        assert (others <= 1).all()
    p = np.array([drawn.probabilities[name] for name in NAMES[: others.shape[1]]])
    above = p * free / p.sum() > 1.0 + 1e-6
    if free >= others.shape[1] and above.all():
        assert (abs(others.sum(0) - 60 * free * p / p.sum()) <= 2.0).all(), "MAX_LAG of the schedule"
    np.testing.assert_array_equal(drawn.before(0, 60), counts.sum(0))


class Run:
    """A loop of one rank's sampler whose windows move the mixture by Grams that follow from the window's number."""

    def __init__(self, ahead: int, **sampler: Any) -> None:
        self.settings = BucketMOOConfig(languages=NAMES[:3], schedule=DOGE | {"probe": sampler.pop("probe", None)})
        rows = ["de"] * 60 + ["fr"] * 24 + ["ko"] * 12
        self.sampler = LanguageBatchSampler(
            None, self.settings, sample_languages=rows, micro_batch_size=2, micro_steps=3, world_size=2, **sampler
        )
        self.ahead = ahead
        self.trained: list[list[int]] = []

    def train(self, windows: int) -> None:
        """Trains that many windows, with `ahead` batches drawn before they are asked for, as loaders do."""
        sampler, mixture = self.sampler, self.sampler.schedule.mixture
        assert mixture is not None
        done, each, stop = 0, 3, windows * 3
        drawn: list[list[int]] = []
        batches = iter(sampler)
        begun = sampler.epoch * sampler.windows_per_epoch + sampler.window
        while done < stop:
            while len(drawn) <= self.ahead:
                try:
                    drawn.append(next(batches))
                except StopIteration:
                    batches = iter(sampler)
            self.trained.append(drawn.pop(0))
            done += 1
            if done % each == 0:
                number = begun + done // each
                mixture.move(some_gram3(number), [0, 1, 2], [0, 1, 2])


def some_gram3(number: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return (rows @ rows.T).tolist()


@pytest.mark.parametrize("ahead", [0, 1, 7])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_draws_the_very_same_rows(ahead: int, rank: int) -> None:
    """Those that were drawn ahead of training are drawn again as they were, across the end of an epoch too."""
    straight = Run(ahead, rank=rank, seed=SEED)
    per_epoch = straight.sampler.windows_per_epoch
    cut, total = per_epoch - 2, per_epoch + 5
    straight.train(total)
    first = Run(ahead, rank=rank, seed=SEED)
    first.train(cut)
    state = json.loads(json.dumps(first.sampler.schedule.mixture.state_dict(), allow_nan=False))
    position = first.sampler.state_dict(epoch=0, window=cut)
    resumed = Run(ahead, rank=rank, seed=SEED)
    resumed.sampler.load_state_dict(position)
    resumed.sampler.schedule.mixture.load_state_dict(state)
    resumed.train(total - cut)
    assert first.trained + resumed.trained == straight.trained
    static = LanguageBatchSampler(
        None, sample_languages=["de"] * 60 + ["fr"] * 24 + ["ko"] * 12, languages=NAMES[:3], micro_batch_size=2,
        micro_steps=3, world_size=2, rank=rank, seed=SEED,
    )  # fmt: skip
    assert per_epoch == static.windows_per_epoch
    assert [*static] != straight.trained[: len(static)], "it moved"


def test_a_round_takes_no_row_twice_and_ranks_no_row_together() -> None:
    runs = [Run(ahead, rank=rank, seed=SEED, probe="ko") for rank, ahead in ((0, 2), (1, 2))]
    for run in runs:
        run.train(runs[0].sampler.windows_per_epoch)
    taken = [row for batches in zip(*(run.trained for run in runs), strict=True) for batch in batches for row in batch]
    for rows in (range(60), range(60, 84), range(84, 96)):
        of_language = [row for row in taken if row in rows]
        for begin in range(0, len(of_language), len(rows)):
            one_round = of_language[begin : begin + len(rows)]
            assert len(set(one_round)) == len(one_round)
    slots = runs[0].sampler.schedule.table(0, 3)
    assert (slots == 2).sum() == 1, "the probe has one place"


def test_the_position_of_other_settings_is_refused() -> None:
    moving, still = Run(0, rank=0).sampler, Run(0, rank=0, seed=1).sampler
    assert moving.fingerprint() != still.fingerprint()
    state = Run(0, rank=0, probe="ko").sampler.state_dict()
    with pytest.raises(ConfigError, match="adapt"):
        moving.load_state_dict(state)
    with pytest.raises(ConfigError, match="the saved mixture is of 2 sampled languages"):
        moving.schedule.mixture.load_state_dict(Run(0, rank=0, probe="ko").sampler.schedule.mixture.state_dict())


# --- in the pipeline --------------------------------------------------------------------------------------------------


def pipeline(
    exchange: Exchange, settings: BucketMOOConfig, shards: dict[int, Any] | None = None, micro_steps: int = 2
) -> BucketMOO:
    held: dict[int, Any] = {} if shards is None else shards
    sink = lambda bucket, shard: held.__setitem__(bucket, shard.clone())  # noqa: E731
    return BucketMOO(settings, plan(), exchange, sink, micro_steps=lambda: micro_steps, once_a_window=False)


def run_window(moo: BucketMOO, window: list[list[Any]]) -> None:
    for step, row in enumerate(window):
        micro = row[moo.exchange.rank]
        moo.begin_micro_step(slot_of(micro, len(window)), step == len(window) - 1)
        for bucket in range(len(moo.plan.buckets)):
            moo.ingest(bucket, flat_of(micro, moo.plan, bucket, moo.exchange))
        moo.end_micro_step([True] * len(moo.plan.parameters))
    moo.finish()


SLOTS = [[(0, 9), (1, 5)], [(2, 7), (0, 8)]]


@pytest.mark.parametrize(
    ("aggregator", "gram", "weighting"),
    [("mean", "plain", "token"), ("mgda", "plain", "language"), ("upgrad", "cross", "token")],
)
def test_a_probe_steers_and_is_not_trained_on(aggregator: str, gram: str, weighting: str) -> None:
    settings = config(
        aggregator=aggregator, gram=gram, weighting=weighting, schedule=DOGE | {"probe": "l2"}, rescale="mean"
    )
    window = table(SLOTS, SEED)

    def body(exchange: Exchange) -> tuple[Any, ...]:
        shards: dict[int, Any] = {}
        moo = pipeline(exchange, settings, shards)
        made = Mixture(settings.languages, np.ones(4), 4, 0, settings.schedule)
        moo.steering.follow(made)
        run_window(moo, window)
        # The same without it: its micro-batch has no target token.
        alone: dict[int, Any] = {}
        other = pipeline(exchange, config(aggregator=aggregator, gram=gram, weighting=weighting, rescale="mean"), alone)
        gone = copy.deepcopy(window)
        gone[1][0] = type(gone[1][0])(2, 0, gone[1][0].gradient)
        run_window(other, gone)
        return moo.last, made.probabilities, shards, other.last, alone, moo.state_dict()

    first, second = run_ranks(2, body)
    last, p, shards, without, alone, state = first
    assert p == second[1], "alike on all ranks"
    assert (last.weights[:, 2] == 0).all()
    assert last.present == (0, 1, 2)
    torch.testing.assert_close(last.weights, without.weights, rtol=1e-12, atol=0)
    for bucket, shard in shards.items():
        assert torch.equal(shard, alone[bucket])
    assert (last.gram[:, 2, 2] > 0).all()
    # Rows as means per token, whatever the weighting.
    tokens = torch.tensor([17.0, 5.0, 7.0, 1.0]).double() if weighting == "token" else torch.full((4,), 11.0).double()
    whole = last.gram.sum(0) / tokens.outer(tokens)
    expected = Mixture(settings.languages, np.ones(4), 4, 0, settings.schedule)
    expected.move(whole.tolist(), [0, 1, 2], [0, 1, 2])
    for name, each in expected.probabilities.items():
        assert p[name] == pytest.approx(each, abs=1e-9)
    assert json.loads(json.dumps(state, allow_nan=False))["mixture"]["logs"]


def test_a_run_that_was_loaded_before_the_sampler_followed_goes_on() -> None:
    settings = config(schedule=DOGE)
    moo, made = pipeline(Exchange(), settings, None, 3), Mixture(NAMES, np.ones(4), 4, 0, settings.schedule)
    moo.steering.follow(made)
    run_window(moo, table([[(0, 9)], [(1, 5)], [(2, 5)]], SEED))
    state, p = json.loads(json.dumps(moo.state_dict())), made.probabilities
    assert p != Mixture(NAMES, np.ones(4), 4, 0, settings.schedule).probabilities
    for first in ("load", "steer"):
        again, fresh = pipeline(Exchange(), settings), Mixture(NAMES, np.ones(4), 4, 0, settings.schedule)
        if first == "load":
            again.load_state_dict(state)
        again.steering.follow(fresh)
        if first == "steer":
            again.load_state_dict(state)
        assert fresh.probabilities == p
        assert fresh.state_dict() == made.state_dict()


def test_a_probe_that_comes_between_two_solves_is_not_trained_on() -> None:
    settings = config(schedule=DOGE | {"probe": "l2"}, gram_every=2, aggregator="mgda")
    moo, made = pipeline(Exchange(), settings), mixture()
    moo.steering.follow(made)
    run_window(moo, table([[(0, 9)], [(1, 5)]], SEED))
    before = made.state_dict()
    run_window(moo, table([[(0, 9)], [(2, 5)]], SEED))
    assert moo.last is not None
    assert not moo.last.fresh
    assert (moo.last.weights[:, 2] == 0).all()
    assert moo.last.weights.sum() > 0
    assert made.state_dict() == before, "no new Gram"


def test_on_windows_of_another_size_only_the_shares_go_on() -> None:
    made, larger = mixture(8), mixture(12)
    made.move(some_gram(torch.Generator().manual_seed(SEED)), [0, 1, 2, 3], ())
    made.counts(0, 5)
    larger.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert larger.probabilities == made.probabilities
    assert larger.counts(0, 0).sum() == 12


def test_windows_that_are_not_finite_or_given_up_move_nothing() -> None:
    settings = config(schedule=DOGE)
    moo, made = pipeline(Exchange(), settings), Mixture(NAMES, np.ones(4), 4, 0, settings.schedule)
    moo.steering.follow(made)
    before = made.state_dict()
    window = table([[(0, 9)], [(1, 5)]], SEED)
    window[0][0].gradient["embed.weight"].fill_(math.inf)
    run_window(moo, window)
    moo.begin_micro_step(slot_of(window[0][0], 2), False)
    moo.abandon()
    assert made.state_dict() == before


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"schedule.adapt = \"doge\": no LanguageBatchSampler follows"):
        run_window(pipeline(Exchange(), config(schedule=DOGE)), table([[(0, 9)], [(1, 5)]], SEED))
    probed = pipeline(Exchange(), config(schedule=DOGE | {"probe": "l1"}))
    probed.steering.follow(mixture())
    with pytest.raises(LanguageError, match="beside the probe, l1"):
        run_window(probed, table([[(1, 9)], [(1, 5)]], SEED))
    with pytest.raises(ConfigError, match="one place of a window"):
        mixture(places=1, probe="de")
    sampler = Run(0, rank=0).sampler
    sampler.follow(pipeline(Exchange(), Run(0, rank=0).settings))
    with pytest.raises(ConfigError, match="give it the same config"):
        sampler.follow(pipeline(Exchange(), config(languages=NAMES[:3])))
    with pytest.raises(ConfigError, match="leave repeat out"):
        Run(0, rank=0, repeat=2)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("doge", "expected an object"),
        ({"adapt": "dodge"}, 'schedule.adapt = \'dodge\': expected "doge"'),
        ({"probe": "de"}, "schedule.adapt = None"),
        ({"adapt": "doge", "prob": "de"}, 'schedule.prob: unknown setting; did you mean "probe"'),
        ({"adapt": "doge", "probe": "dee"}, 'schedule.probe = .*did you mean "de"'),
        ({"adapt": "doge", "rate": 0}, "schedule.rate = 0: expected a number above 0"),
        ({"adapt": "doge", "mix": 1.5}, "schedule.mix = 1.5: expected a number above 0, at most 1"),
        ({"adapt": "doge", "clip": True}, "schedule.clip"),
    ],
)
def test_settings_out_of_range(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BucketMOOConfig(languages=NAMES, schedule=schedule)


def test_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r'schedule.adapt: not in mode "mixed"'):
        BucketMOOConfig(languages=NAMES, mode="mixed", schedule=DOGE)
    with pytest.raises(ConfigError, match="expected two or more beside it"):
        BucketMOOConfig(languages=NAMES[:2], schedule=DOGE | {"probe": "de"})
    whole = BucketMOOConfig(languages=NAMES, schedule=DOGE)
    assert BucketMOOConfig(**whole.to_json()) == whole
