"""The pipeline of a window: one process over gloo, and several simulated ranks, against the float64 reference."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draw import examples
from halves_by_rule import halves_by_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.simulated_ranks import SimulatedExchange, run_ranks

from bucketmoo_ds import aggregate, reference
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import CHOICES, BucketMOOConfig
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.errors import BucketMOOError, ConfigError, DisagreementError, LanguageError
from bucketmoo_ds.pipeline import engine
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.pipeline.resolution import Resolution
from bucketmoo_ds.plan.blocks import GRANULARITIES, BlockPlan, Parameter, granularity_of, plan_blocks
from bucketmoo_ds.plan.choices import choose_streaming, create_aggregator

AGGREGATORS = ("mean", "mgda", "pcgrad", "cagrad", "upgrad")
PARAMETERS = [
    Parameter("embed.weight", 61),
    Parameter("layers.0.a", 33),
    Parameter("layers.0.b", 40),
    Parameter("layers.1.a", 33),
    Parameter("layers.1.b", 47),
    Parameter("head.weight", 29),
]
BUCKET_SIZE = 90

Micro = reference.MicroGradient
Table = list[list[Micro]]  # [M][W]


def config(**changes: Any) -> BucketMOOConfig:
    return BucketMOOConfig(**{"languages": ["l0", "l1", "l2", "l3"], "aggregator": "mgda"} | changes)


def plan(granularity: str = "bucket", bucket_size: int = BUCKET_SIZE) -> BlockPlan:
    return plan_blocks(PARAMETERS, bucket_size, granularity)


def table(
    slots: Sequence[Sequence[tuple[int, int]]], seed: int, dtype: torch.dtype = torch.float32, pull: float = 1.0
) -> Table:
    """Random gradients of the (language, target tokens) slots; each language pulls its own way."""
    generator = torch.Generator().manual_seed(seed)
    pulls = [{p.name: torch.randn(p.numel, generator=generator) for p in PARAMETERS} for _ in range(8)]

    def micro(language: int, tokens: int) -> Micro:
        noise = {p.name: torch.randn(p.numel, generator=generator) for p in PARAMETERS}
        gradient = {name: ((pull * pulls[language][name] + noise[name]) / len(slots)).to(dtype) for name in noise}
        if tokens == 0:  # the mean of no loss at all
            gradient = {name: torch.full_like(one, math.nan) for name, one in gradient.items()}
        loss = math.nan if tokens == 0 else 0.5 + language + float(torch.rand((), generator=generator))
        return Micro(language, tokens, gradient, loss)

    return [[micro(language, tokens) for language, tokens in row] for row in slots]


@dataclasses.dataclass
class Outcome:
    """What one rank ends with after some windows."""

    resolutions: list[Resolution]
    shards: list[dict[int, Tensor]]
    moo: BucketMOO


def drive(
    exchange: Exchange,
    windows: Sequence[Table],
    settings: BucketMOOConfig,
    blocks: BlockPlan,
    *,
    once_a_window: bool = False,
    overlap: bool = False,
    state: dict[str, Any] | None = None,
) -> Outcome:
    """Does what an adapter does."""
    found: list[dict[int, Tensor]] = []
    moo = BucketMOO(
        settings,
        blocks,
        exchange,
        lambda bucket, shard: found[-1].__setitem__(bucket, shard.clone()),
        micro_steps=lambda: len(windows[0]),
        once_a_window=once_a_window,
        overlap=overlap,
    )
    if state is not None:
        moo.load_state_dict(state)
    resolutions = []
    for window in windows:
        found.append({})
        sums: list[Tensor] = []
        for step, row in enumerate(window):
            micro, boundary = row[exchange.rank], step == len(window) - 1
            moo.begin_micro_step(slot_of(micro, len(window)), boundary)
            flats = [flat_of(micro, blocks, bucket, exchange) for bucket in range(len(blocks.buckets))]
            if once_a_window:
                factor = moo.window.own_factor(exchange.rank)
                flats = [flat if micro.target_tokens else torch.zeros_like(flat) for flat in flats]
                flats = [flat * factor + (sums[bucket] if sums else 0.0) for bucket, flat in enumerate(flats)]
                sums = flats
            if boundary or not once_a_window:
                for bucket, flat in enumerate(flats):
                    moo.ingest(bucket, flat)
            moo.end_micro_step([True] * len(blocks.parameters))
        resolutions.append(moo.finish())
    return Outcome(resolutions, found, moo)


def slot_of(micro: Micro, micro_steps: int) -> Slot:
    summed = torch.tensor(micro.target_tokens * micro.loss)
    return Slot(micro.language, micro.target_tokens, float(micro_steps * micro.target_tokens), summed)


def flat_of(micro: Micro, blocks: BlockPlan, bucket: int, exchange: Exchange) -> Tensor:
    parts = [micro.gradient[blocks.parameters[index].name] for index in blocks.buckets[bucket].parameters]
    numel = exchange.world_size * exchange.shard_numel(blocks.buckets[bucket].numel)
    return torch.nn.functional.pad(torch.cat(parts), (0, numel - blocks.buckets[bucket].numel))


def simulate(windows: Sequence[Table], settings: BucketMOOConfig, blocks: BlockPlan, **how: Any) -> list[Outcome]:
    outcomes = run_ranks(len(windows[0][0]), lambda exchange: drive(exchange, windows, settings, blocks, **how))
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def combined(outcomes: Sequence[Outcome], window: int = -1) -> dict[str, Tensor]:
    """The combined gradient by parameter name, put together from the ranks' shards."""
    blocks = outcomes[0].moo.plan
    result = {}
    for number, bucket in enumerate(blocks.buckets):
        flat = torch.cat([outcome.shards[window][number] for outcome in outcomes])
        assert (flat[bucket.numel :] == 0).all(), "padding"
        for index, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            parameter = blocks.parameters[index]
            result[parameter.name] = flat[offset : offset + parameter.numel]
    return result


def names_of_blocks(blocks: BlockPlan) -> dict[str, list[str]]:
    return {
        block: [p.name for p, of in zip(blocks.parameters, blocks.block_of, strict=True) if of == number]
        for number, block in enumerate(blocks.blocks)
    }


def assert_equals_reference(outcomes: Sequence[Outcome], windows: Sequence[Table], settings: BucketMOOConfig) -> None:
    moo = outcomes[0].moo
    for number, window in enumerate(windows):
        micros = [micro for row in with_halves(window, moo.window.once_a_window) for micro in row]
        moo.record.windows = number
        expected, weights = reference.resolve_window(
            micros,
            names_of_blocks(moo.plan),
            micro_steps=len(window),
            aggregator=create_aggregator(settings),
            weighting=settings.weighting,
            normalize=settings.normalize,
            rescale=settings.rescale,
            preference=settings.preferred(range(len(settings.languages))),
            gram=settings.gram,
            seed=moo.record.generator().initial_seed(),
            left_out=dict(zip(moo.plan.blocks, moo.plan.left_out, strict=False)),
        )
        found = combined(outcomes, number)
        resolution = outcomes[0].resolutions[number]
        for block, names in names_of_blocks(moo.plan).items():
            ours, theirs = (torch.cat([of[name].double() for name in names]) for of in (found, expected))
            of_block = moo.plan.blocks.index(block)
            gram = resolution.gram[of_block].diagonal()[list(resolution.present)].sqrt()
            # Rows are sums of at most 9 micro-batches in float32 and the result is rounded once more: ten roundings of
            # 2^-24 are 6e-7 at worst and 1e-7 as a rule, of the norms of what was summed.
            size = float((weights[block].abs() * gram).sum())
            assert float((ours - theirs).norm()) <= 5e-7 * size, (block, settings)
            torch.testing.assert_close(
                resolution.weights[of_block, list(resolution.present)], weights[block], rtol=1e-5, atol=2e-6
            )


def with_halves(window: Table, once_a_window: bool) -> Table:
    """The micro-batches with their halves; they say nothing where Grams are plain."""
    slots = [[(micro.language, micro.target_tokens) for micro in row] for row in window]
    return [
        [dataclasses.replace(micro, half=half) for micro, half in zip(row, halves, strict=True)]
        for row, halves in zip(window, halves_by_rule(slots, sticks=once_a_window), strict=True)
    ]


@pytest.fixture
def alone() -> Iterator[Exchange]:
    """An exchange over gloo with a world of one."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=20)
    )
    yield Exchange()
    dist.destroy_process_group()


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[bool, list[list[list[tuple[int, int]]]]]:
    """Whether ranks add up locally, and two windows of [M][W] slots; some micro-batches have no target token."""
    once_a_window, micro_steps, world_size = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens = st.sampled_from([0, 1, 5, 64, 64, 64, 300])
    windows = []
    for _ in range(2):
        first = [draw(st.integers(0, 3)) for _ in range(world_size)]
        rows = [first if once_a_window else [draw(st.integers(0, 3)) for _ in first] for _ in range(micro_steps)]
        slots = [[(language, draw(tokens)) for language in row] for row in rows]
        if not any(count for row in slots for _, count in row):
            slots[0][0] = (slots[0][0][0], 7)
        windows.append(slots)
    return once_a_window, windows


@pytest.mark.parametrize("aggregator", [*AGGREGATORS, "stch"])
@settings(deadline=None, max_examples=examples(7))
@given(
    scenario=scenarios(),
    seed=st.integers(0, 2**32),
    granularity=st.sampled_from(sorted(GRANULARITIES)),
    weighting=st.sampled_from(CHOICES["weighting"]),
    normalize=st.sampled_from(CHOICES["normalize"]),
    rescale=st.sampled_from(CHOICES["rescale"]),
    preference=st.sampled_from([(), (1.0, 2.0, 0.5, 4.0)]),
    gram=st.sampled_from(CHOICES["gram"]),
    overlap=st.booleans(),
)
def test_equals_the_reference(
    aggregator: str, scenario: tuple, seed: int, granularity: str, overlap: bool, **options: Any
) -> None:
    once_a_window, slots = scenario
    if once_a_window and len(slots[0][0]) == 1:
        options["gram"] = "plain"  # one rank that adds up its micro-steps has no halves, and is refused
    # Across halves a Gram may be singular, and weights then answer to rounding: its languages pull clearly.
    pull = 5.0 if options["gram"] == "cross" else 1.0
    windows = [table(one, seed + number, pull=pull) for number, one in enumerate(slots)]
    chosen = config(aggregator=aggregator, granularity=granularity, **options)
    outcomes = simulate(windows, chosen, plan(granularity), once_a_window=once_a_window, overlap=overlap)
    assert_equals_reference(outcomes, windows, chosen)
    for outcome in outcomes[1:]:
        for mine, first in zip(outcome.resolutions, outcomes[0].resolutions, strict=True):
            assert torch.equal(mine.weights, first.weights)
            assert torch.equal(mine.gram, first.gram)


@pytest.mark.parametrize("aggregator", [*AGGREGATORS, "random", "static", "stch"])
@settings(deadline=None, max_examples=examples(4))
@given(
    slots=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90)), min_size=1, max_size=4).filter(
        lambda found: any(tokens > 0 for _, tokens in found)
    ),
    granularity=st.sampled_from(["bucket", "parameter"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    overlap=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_streaming_equals_deferred_to_the_bit(
    aggregator: str, slots: list[tuple[int, int]], granularity: str, dtype: torch.dtype, **draws: int
) -> None:
    overlap, seed = bool(draws["overlap"]), draws["seed"]
    windows = [table([slots], seed + number, dtype) for number in range(2)]
    # A fast backend adds up 16-bit rows, which streaming keeps, in another order than the store's float32 rows.
    backend = "auto" if dtype == torch.float32 else "reference"
    results = []
    for mode in ("streaming", "deferred"):
        shares = {"shares": {"l0": 1.0, "l1": 2.0, "l2": 4.0, "l3": 8.0}} if aggregator == "static" else {}
        settings = config(aggregator=aggregator, aggregator_options=shares, mode=mode, backend=backend)
        outcomes = simulate(windows, settings, plan(granularity), overlap=overlap)
        assert outcomes[0].moo.streaming == (mode == "streaming")
        results.append(outcomes)
    for window in range(2):
        streamed, deferred = (combined(outcomes, window) for outcomes in results)
        for name in streamed:
            assert torch.equal(streamed[name], deferred[name])
        streamed, deferred = (outcomes[0].resolutions[window] for outcomes in results)
        assert torch.equal(streamed.weights, deferred.weights)
        assert torch.equal(streamed.gram, deferred.gram)
        if aggregator == "static":
            expected = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64) * (streamed.weights[0] > 0)
            torch.testing.assert_close(streamed.weights[0], expected / expected.sum(), rtol=1e-14, atol=0)


def test_streaming_and_deferred_agree_on_16_bit_rows() -> None:
    windows = [table([[(0, 7), (1, 5), (2, 11), (1, 3)]], seed=5, dtype=torch.bfloat16)]
    streamed, deferred = (
        simulate(windows, config(mode=mode), plan())[0].resolutions[0].gram for mode in ("streaming", "deferred")
    )
    norms = deferred.diagonal(dim1=1, dim2=2).sqrt()
    # 1.9e-6 is the bound of a Gram of 16-bit rows (csrc/cpu/kernels_impl.h); that of few float32 rows is exact.
    assert ((streamed - deferred).abs() <= 1.9e-6 * norms.unsqueeze(-1) * norms.unsqueeze(-2)).all()
    assert deferred.any()


@pytest.mark.parametrize("mode", ["streaming", "deferred"])
@pytest.mark.parametrize("tokens", [(0, 70), (70, 0), (3, 70)])
def test_local_sums_whose_first_micro_batch_is_empty(mode: str, tokens: tuple[int, int]) -> None:
    """ZeRO-1: the language's first micro-batch with a token is on rank 1, so its scale is not rank 0's."""
    windows = [table([[(2, tokens[0]), (2, 11)], [(2, tokens[1]), (2, 50)]], seed=3)]
    chosen = config(mode=mode)
    assert_equals_reference(simulate(windows, chosen, plan(), once_a_window=True), windows, chosen)


@pytest.mark.parametrize("mode", ["streaming", "deferred"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_one_language_is_averaging(alone: Exchange, aggregator: str, mode: str) -> None:
    windows = [table([[(0, 17)]], seed=5)]
    outcome = drive(alone, windows, config(languages=["de"], aggregator=aggregator, mode=mode), plan())
    for name, found in combined([outcome]).items():
        assert torch.equal(found, windows[0][0][0].gradient[name]), "one micro-batch: not even a rounding"
    assert torch.equal(outcome.resolutions[0].weights, torch.ones(len(outcome.moo.plan.blocks), 1, dtype=torch.float64))


@settings(deadline=None, max_examples=examples(10))
@given(
    languages=st.permutations([0, 1, 2, 3, 0, 1, 2, 3]),
    tokens=st.integers(1, 1000),
    weighting=st.sampled_from(CHOICES["weighting"]),
    granularity=st.sampled_from(sorted(GRANULARITIES)),
    seed=st.integers(0, 2**32),
)
def test_mean_is_plain_averaging_when_languages_feed_equally(
    languages: list[int], tokens: int, weighting: str, granularity: str, seed: int
) -> None:
    slots = [[(language, tokens) for language in languages[start : start + 2]] for start in range(0, 8, 2)]
    windows = [table(slots, seed)]
    chosen = config(aggregator="mean", weighting=weighting)
    assert_averages(simulate(windows, chosen, plan(granularity)), windows[0], [1 / 2] * 8)


@settings(deadline=None, max_examples=examples(10))
@given(
    slots=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), min_size=2, max_size=2), min_size=1, max_size=3
    ),
    granularity=st.sampled_from(sorted(GRANULARITIES)),
    seed=st.integers(0, 2**32),
)
def test_token_weighting_with_mean_is_averaging_over_tokens(
    slots: list[list[tuple[int, int]]], granularity: str, seed: int
) -> None:
    windows = [table(slots, seed)]
    total = sum(tokens for row in slots for _, tokens in row)
    factors = [tokens / total * len(slots) for row in slots for _, tokens in row]
    chosen = config(aggregator="mean", weighting="token")
    assert_averages(simulate(windows, chosen, plan(granularity)), windows[0], factors)


def assert_averages(outcomes: Sequence[Outcome], window: Table, factors: Sequence[float]) -> None:
    """Plain averaging by hand: the gradients are divided by M already, `factors` do the rest."""
    micros = [micro for row in window for micro in row]
    for name, found in combined(outcomes).items():
        parts = [factor * micro.gradient[name].double() for factor, micro in zip(factors, micros, strict=True)]
        expected, size = sum(parts), sum(part.norm() for part in parts)
        # At most 8 terms are added in float32 and the sum is rounded to it: 9 roundings of 2^-24 of the sizes.
        assert float((found.double() - expected).norm()) <= 9 * 2**-24 * float(size)


@pytest.mark.parametrize("mode", ["streaming", "deferred"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_skips_the_step(mode: str, poison: float, caplog: pytest.LogCaptureFixture) -> None:
    blocks = plan()
    windows = [table([[(0, 5), (3, 5)]], seed) for seed in range(3)]
    name = blocks.parameters[blocks.buckets[1].parameters[0]].name
    windows[1][0][1].gradient[name][4] = poison
    with caplog.at_level(logging.WARNING, logger="bucketmoo_ds"):
        outcomes = simulate(windows, config(mode=mode), blocks)
    bucket = blocks.buckets[1].name
    for outcome in outcomes:
        assert [one.nonfinite for one in outcome.resolutions] == [(), (("l3", bucket),), ()]
        # What has left is no number; the adapter skips the step.
        assert all(set(shards) == set(range(len(blocks.buckets))) for shards in outcome.shards)
        assert outcome.moo.counters == {"windows": 3, "skipped_windows": 1, "nonfinite.l3": 1}
        assert outcome.resolutions[1].weights.isfinite().all()
    assert [record.getMessage() for record in caplog.records] == [
        f"window 1: rows that are not finite, step skipped: language l3 in {bucket}"
    ], "once, on rank 0"
    good = simulate(windows[:1] + windows[2:], config(mode=mode), blocks)
    for name, found in combined(outcomes, 2).items():
        assert torch.equal(found, combined(good, 1)[name]), "nothing of the bad window is left"


def test_every_language_and_bucket_that_is_not_finite_is_named() -> None:
    blocks = plan("model")
    windows = [table([[(0, 5), (1, 5)], [(2, 5), (1, 5)]], seed=1)]
    windows[0][1][0].gradient["embed.weight"][0] = math.nan
    windows[0][0][1].gradient["head.weight"][:] = math.inf
    (resolution,) = simulate(windows, config(), blocks)[0].resolutions
    first, last = blocks.buckets[0].name, blocks.buckets[-1].name
    assert set(resolution.nonfinite) == {("l1", first), ("l2", last)}


def test_absent_languages_are_masked() -> None:
    """Language 1 is in the table without a token and its gradient is NaN, language 2 is not there at all."""
    windows = [table([[(0, 5), (1, 0)], [(3, 8), (1, 0)]], seed=2)]
    chosen = config(granularity="layer")
    outcomes = simulate(windows, chosen, plan("layer"))
    (resolution,) = outcomes[0].resolutions
    assert resolution.present == (0, 3)
    assert resolution.target_tokens == (5, 0, 0, 8)
    assert resolution.nonfinite == ()
    assert (resolution.weights[:, 1:3] == 0).all()
    assert (resolution.gram[:, 1:3] == 0).all()
    assert (resolution.gram[:, :, 1:3] == 0).all()
    assert resolution.mask.tolist() == [[True, False, False, True]] * len(outcomes[0].moo.plan.blocks)
    assert_equals_reference(outcomes, windows, chosen)


REFINED = {"base": "layer", "used_by": {"layers.0.*": ["l1", "l3"], "layers.1.a": ["l2"], "layers.1.b": ["l0", "l2"]}}


@settings(deadline=None, max_examples=examples(12))
@given(
    scenario=scenarios(),
    seed=st.integers(0, 2**32),
    aggregator=st.sampled_from(AGGREGATORS),
    weighting=st.sampled_from(CHOICES["weighting"]),
    normalize=st.sampled_from(CHOICES["normalize"]),
    rescale=st.sampled_from(CHOICES["rescale"]),
    bucket_size=st.sampled_from([BUCKET_SIZE, 1000]),  # blocks span buckets, or one bucket holds them and may stream
)
def test_languages_that_are_left_out_of_a_block_weigh_nothing_there(
    scenario: tuple, seed: int, bucket_size: int, **options: str
) -> None:
    """Everything else is as if they were absent, which on that block they are: also where that leaves nobody."""
    once_a_window, slots = scenario
    chosen = config(granularity="refined", granularity_options=REFINED, **options)
    blocks = plan_blocks(PARAMETERS, bucket_size, granularity_of(chosen))
    # What all use meets what some share on a cycle: what is used by l2 alone stays apart.
    assert blocks.blocks == ("embed + 3 more", "layers.1 (l2)")
    assert blocks.left_out == ((), (0, 1, 3))
    windows = [table(one, seed + number) for number, one in enumerate(slots)]
    for micro in (micro for window in windows for row in window for micro in row):
        if micro.language != 2:
            micro.gradient["layers.1.a"].zero_()
    outcomes = simulate(windows, chosen, blocks, once_a_window=once_a_window)
    assert_equals_reference(outcomes, windows, chosen)
    for resolution in outcomes[0].resolutions:
        assert (resolution.weights[1, [0, 1, 3]] == 0).all()
        present = [each in resolution.present for each in range(4)]
        assert resolution.mask.tolist() == [present, [False, False, present[2], False]]
        if 2 in resolution.present:
            assert resolution.weights[1, 2] == 1.0


@pytest.mark.parametrize("granularity", ["deferred", "streaming"])
def test_a_gradient_of_a_language_that_was_left_out_stops_every_rank(granularity: str) -> None:
    used_by = {"head.weight": ["l0"]}
    options = {"granularity_options": {"used_by": used_by, "base": "parameter"}, "mode": granularity}
    chosen = config(granularity="refined", **options)
    # A bucket a parameter: but for the head, all of them are one block, which does not stream.
    parameters = PARAMETERS[-1:] if granularity == "streaming" else PARAMETERS
    blocks = plan_blocks(parameters, 1, granularity_of(chosen))
    errors = run_ranks(2, lambda exchange: drive(exchange, [table([[(0, 5), (3, 8)]], 2)], chosen, blocks))
    for error in errors:
        assert isinstance(error, ConfigError)
        assert 'used_by: language "l3" has a gradient on block "head.weight", of norm' in str(error)


def test_gram_is_of_the_rows_as_the_aggregator_sees_them() -> None:
    windows = [table([[(0, 5), (1, 20)], [(0, 10), (1, 2)]], seed=4)]
    (resolution,) = simulate(windows, config(), plan("model"))[0].resolutions
    micros = [micro for row in windows[0] for micro in row]
    rows = []
    for language in (0, 1):
        mine = [micro for micro in micros if micro.language == language]
        total = sum(micro.target_tokens for micro in mine)
        flat = [torch.cat([micro.gradient[p.name].double() for p in PARAMETERS]) for micro in mine]
        rows.append(sum(2 * micro.target_tokens / total * one for micro, one in zip(mine, flat, strict=True)))
    expected = torch.stack(rows) @ torch.stack(rows).T
    # Rows of two micro-batches, added in float32.
    torch.testing.assert_close(resolution.gram[0, :2, :2], expected, rtol=0, atol=4 * 2**-24 * float(expected.max()))


@pytest.mark.parametrize(("together", "collectives"), [(1, 4), (100, 2), (engine.TOGETHER, 1)])
def test_grams_travel_together(together: int, collectives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    for name in ("all_gather_grams", "all_to_all_grams"):
        original = getattr(SimulatedExchange, name)
        monkeypatch.setattr(
            SimulatedExchange, name, lambda self, own, do=original: (calls.append(own.shape), do(self, own))[1]
        )
    monkeypatch.setattr(engine, "TOGETHER", together)
    blocks = plan("parameter")
    simulate([table([[(0, 1), (1, 1)], [(2, 1), (1, 1)]], seed=4)], config(), blocks)
    a_rank = -(-len(blocks.blocks) // 2)
    assert sorted(map(tuple, calls)) == sorted([(2, a_rank, 3, 3), (a_rank, 3 * 4)] * 2), "deferred: two a window"
    calls.clear()
    simulate([table([[(0, 1), (1, 1)]], seed=4)], config(), blocks)
    assert len(calls) == 2 * collectives


class TestBeginMicroStep:
    def errors(self, body: Any, world_size: int = 2, **how: Any) -> list[str]:
        def rank(exchange: SimulatedExchange) -> None:
            moo = make(exchange, **how)
            body(moo, exchange.rank)

        found = run_ranks(world_size, rank)
        return [f"{type(error).__name__}: {error}" for error in found]

    def test_one_ranks_error_is_raised_on_all(self) -> None:
        def body(moo: BucketMOO, rank: int) -> None:
            moo.begin_micro_step(LanguageError('language "xx" is new') if rank == 1 else Slot(0, 1, 1.0), True)

        assert self.errors(body, 3) == ['LanguageError: rank 1: language "xx" is new'] * 3

    def test_all_errors_are_told(self) -> None:
        found = self.errors(lambda moo, rank: moo.begin_micro_step(LanguageError(f"bad {rank}"), True))
        assert found == ["LanguageError: rank 0: bad 0; rank 1: bad 1"] * 2

    def test_an_error_with_a_broken_name_still_reaches_all(self) -> None:
        def body(moo: BucketMOO, rank: int) -> None:
            moo.begin_micro_step(LanguageError("language \ud800") if rank == 1 else Slot(0, 1, 1.0), True)

        assert self.errors(body) == ["LanguageError: rank 1: language \\ud800"] * 2

    def test_boundary(self) -> None:
        found = self.errors(lambda moo, rank: moo.begin_micro_step(Slot(0, 1, 1.0), boundary=rank == 0))
        assert found == [
            "DisagreementError: ranks disagree about the boundary (rank 0: 1, rank 1: 0): run one script on all"
        ] * 2

    def test_window(self) -> None:
        def body(moo: BucketMOO, rank: int) -> None:
            moo.record.windows = 4 + rank
            moo.begin_micro_step(Slot(0, 1, 1.0), True)

        assert "disagree about the window (rank 0: 4, rank 1: 5)" in self.errors(body)[0]

    def test_micro_step(self) -> None:
        def body(moo: BucketMOO, rank: int) -> None:
            moo.window.micro_steps = rank
            moo.begin_micro_step(Slot(0, 1, 1.0), True)

        assert "disagree about the micro-step (rank 0: 0, rank 1: 1)" in self.errors(body)[1]

    @pytest.mark.parametrize("change", [{"seed": 1}, {"languages": ["l0", "l1"]}, {"aggregator_options": {"c": 0.1}}])
    def test_settings(self, change: dict[str, Any]) -> None:
        def rank(exchange: SimulatedExchange) -> None:
            moo = make(exchange, aggregator="cagrad", **(change if exchange.rank else {}))
            moo.begin_micro_step(Slot(0, 1, 1.0), True)

        for error in run_ranks(2, rank):
            assert isinstance(error, DisagreementError)
            assert "settings or blocks" in str(error)

    def test_blocks(self) -> None:
        def rank(exchange: SimulatedExchange) -> None:
            make(exchange, plan(bucket_size=BUCKET_SIZE + exchange.rank * 60)).begin_micro_step(Slot(0, 1, 1.0), True)

        for error in run_ranks(2, rank):
            assert isinstance(error, DisagreementError)
            assert "settings or blocks" in str(error)

    def test_change_of_language_within_a_window_on_zero_1(self) -> None:
        def body(moo: BucketMOO, rank: int) -> None:
            moo.begin_micro_step(Slot(rank, 1, 2.0), False)
            moo.begin_micro_step(Slot(1, 1, 2.0), True)

        found = self.errors(body, micro_steps=2, once_a_window=True)
        assert found[0] == found[1]
        assert 'rank 0 went from language "l0" to "l1" within a window' in found[0]
        assert self.errors(body, micro_steps=2, once_a_window=False) == ["NoneType: None"] * 2

    def test_window_without_a_target_token(self) -> None:
        def body(moo: BucketMOO, rank: int) -> None:
            moo.begin_micro_step(Slot(0, 0, 0.0), False)
            moo.begin_micro_step(Slot(1, 0, 0.0), True)

        assert self.errors(body, micro_steps=2) == [
            "LanguageError: no language fed a target token to this window: there is nothing to resolve"
        ] * 2


class TestFinish:
    @pytest.mark.parametrize(("count", "odd"), [(3, 1), (64, 63), (70, 0), (70, 63), (70, 64), (130, 129)])
    @pytest.mark.parametrize("step", [0, 1])
    def test_gradients_of_different_parameters(self, count: int, odd: int, step: int) -> None:
        blocks = plan_blocks([Parameter(f"p{index}", 1) for index in range(count)], 1000, "model")

        def rank(exchange: SimulatedExchange) -> None:
            moo = make(exchange, blocks, micro_steps=2)
            for now in range(2):
                moo.begin_micro_step(Slot(0, 1, 2.0), boundary=now == 1)
                moo.ingest(0, torch.randn(3 * exchange.shard_numel(count)))
                missing = odd if now == step and exchange.rank == 1 else None
                moo.end_micro_step([index != missing for index in range(count)])
            moo.finish()

        for error in run_ranks(3, rank):
            assert isinstance(error, DisagreementError)
            assert f'parameter "p{odd}" got a gradient in micro-step {step} on rank(s) [0, 2] only' in str(error)

    def test_equally_unused_parameters_are_fine(self) -> None:
        def rank(exchange: SimulatedExchange) -> Resolution:
            moo = make(exchange)
            moo.begin_micro_step(Slot(0, 1, 1.0), True)
            for bucket in range(len(moo.plan.buckets)):
                moo.ingest(bucket, torch.randn(2 * exchange.shard_numel(moo.plan.buckets[bucket].numel)))
            moo.end_micro_step([index != 3 for index in range(len(PARAMETERS))])
            return moo.finish()

        assert all(isinstance(found, Resolution) for found in run_ranks(2, rank))

    @pytest.mark.parametrize("mode", ["streaming", "deferred"])
    def test_a_bucket_that_never_came(self, alone: Exchange, mode: str) -> None:
        moo = make(alone, mode=mode)
        moo.begin_micro_step(Slot(0, 1, 1.0), True)
        for bucket in range(len(moo.plan.buckets) - 1):
            moo.ingest(bucket, torch.randn(alone.shard_numel(moo.plan.buckets[bucket].numel)))
        moo.end_micro_step([True] * len(PARAMETERS))
        total = len(moo.plan.buckets)
        with pytest.raises(BucketMOOError) as caught:
            moo.finish()
        assert str(caught.value) == f"1 of {total} buckets were not resolved, first {moo.plan.buckets[-1].name}"

    def test_ranks_that_solve_differently_hold_the_same_weights(self) -> None:
        """As ranks on unlike CPUs may: each block is solved by one of them."""
        windows = [table([[(0, 5), (1, 5)]], seed=1)]

        def rank(exchange: SimulatedExchange) -> torch.Tensor:
            moo = make(exchange, plan("parameter"), mode="deferred")
            if exchange.rank == 1:
                moo.resolver.aggregator = aggregate.create("mean")
            moo.begin_micro_step(slot_of(windows[0][0][exchange.rank], 1), True)
            for bucket in range(len(moo.plan.buckets)):
                moo.ingest(bucket, flat_of(windows[0][0][exchange.rank], moo.plan, bucket, exchange))
            moo.end_micro_step([True] * len(PARAMETERS))
            return moo.finish().weights

        weights, others = run_ranks(2, rank)
        assert torch.equal(weights, others)
        solved_by_mean = (weights == weights.amax(-1, keepdim=True)).sum(-1) == 2
        assert solved_by_mean.tolist() == [block % 2 == 1 for block in range(len(weights))]

    def test_in_window(self, alone: Exchange) -> None:
        moo = make(alone, micro_steps=2)
        assert not moo.in_window
        moo.begin_micro_step(Slot(0, 1, 2.0), False)
        assert moo.in_window


class TestState:
    @pytest.mark.parametrize("aggregator", ["mgda", "pcgrad"])
    def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(self, aggregator: str) -> None:
        windows = [table([[(0, 3), (1, 5)], [(2, 7), (3, 9)]], seed) for seed in range(4)]
        chosen, blocks = config(aggregator=aggregator), plan("layer")
        whole = simulate(windows, chosen, blocks)
        first = simulate(windows[:2], chosen, blocks)
        state = json.loads(json.dumps(first[0].moo.state_dict()))
        second = simulate(windows[2:], chosen, blocks, state=state)
        for window in (2, 3):
            found = combined(second, window - 2)
            assert all(torch.equal(found[name], one) for name, one in combined(whole, window).items())
            assert second[0].resolutions[window - 2].window == window
        assert second[0].moo.state_dict() == whole[0].moo.state_dict()

    def test_random_orders_differ_from_window_to_window_and_seed_to_seed(self, alone: Exchange) -> None:
        moo, other = make(alone), make(alone, seed=1)
        seeds = set()
        for window in range(20):
            moo.record.windows = other.record.windows = window
            seeds |= {moo.record.generator().initial_seed(), other.record.generator().initial_seed()}
        assert len(seeds) == 40

    def test_counters_continue(self, alone: Exchange) -> None:
        windows = [table([[(0, 3)]], seed) for seed in range(2)]
        windows[1][0][0].gradient["head.weight"][0] = math.nan
        state = drive(alone, windows, config(), plan()).moo.state_dict()
        later = drive(alone, windows, config(), plan(), state=state).moo
        assert later.counters == {"windows": 4, "skipped_windows": 2, "nonfinite.l0": 2}
        assert later.windows == 4

    def test_other_blocks_are_refused(self, alone: Exchange) -> None:
        state = make(alone, plan("layer")).state_dict()
        moo = make(alone, plan("bucket"))
        with pytest.raises(ConfigError) as caught:
            moo.load_state_dict(state)
        assert "the checkpoint's blocks are not this run's" in str(caught.value)
        assert state["fingerprint"] in str(caught.value)
        assert "zero_optimization.reduce_bucket_size and bucket_moo.granularity" in str(caught.value)
        assert moo.windows == 0


class TestChoices:
    @pytest.mark.parametrize(
        ("mode", "granularity", "aggregator", "exchanges", "streaming"),
        [
            ("auto", "bucket", "mgda", 1, True),
            ("auto", "parameter", "mean", 1, True),
            ("auto", "bucket", "pcgrad", 2, False),
            ("auto", "model", "mgda", 1, False),
            ("auto", "bucket", "cagrad", 1, False),
            ("streaming", "bucket", "cagrad", 1, True),
            ("deferred", "bucket", "mgda", 1, False),
            ("streaming", "parameter", "mgda", 1, True),
        ],
    )
    def test_mode(self, mode: str, granularity: str, aggregator: str, exchanges: int, streaming: bool) -> None:
        chosen = config(mode=mode, granularity=granularity, aggregator=aggregator)
        assert choose_streaming(chosen, plan(granularity), exchanges) == streaming

    def test_streaming_where_it_cannot_be(self) -> None:
        with pytest.raises(ConfigError, match=r'bucket_moo.mode = "streaming": a window has 3 exchanges'):
            choose_streaming(config(mode="streaming"), plan(), 3)
        with pytest.raises(ConfigError, match=r'blocks of granularity "model" span several buckets'):
            choose_streaming(config(mode="streaming", granularity="model"), plan("model"), 1)
        one_bucket = plan("model", bucket_size=10**6)
        assert choose_streaming(config(mode="streaming", granularity="model"), one_bucket, 1)

    def test_aggregator(self) -> None:
        with pytest.raises(ConfigError) as caught:
            create_aggregator(config(aggregator="mdga"))
        assert 'bucket_moo.aggregator = "mdga": unknown, expected one of' in str(caught.value)
        assert 'did you mean "mgda"?' in str(caught.value)

    @pytest.mark.parametrize("options", [{"cc": 0.5}, {"c": "auto"}, {"c": -1.0}, {"name": "mgda"}, {"c": None}])
    def test_aggregator_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"^bucket_moo\.aggregator_options: "):
            create_aggregator(config(aggregator="cagrad", aggregator_options=options))

    def test_unknown_backend(self, alone: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BUCKETMOO_BACKEND", raising=False)
        with pytest.raises(ConfigError, match=r'bucket_moo\.backend = "fast"'):
            make(alone, backend="fast")

    def test_describe(self, alone: Exchange) -> None:
        line = make(alone, micro_steps=3).describe()
        for part in ("aggregator mgda", "granularity bucket", "l0, l1, l2, l3", "world size 1", "3 micro-steps",
                     "deferred", "nothing to exchange", "backend "):
            assert part in line
        assert "\n" not in line
        assert "streaming, nothing to exchange" in make(alone, micro_steps=3, once_a_window=True).describe()


def make(
    exchange: Exchange,
    blocks: BlockPlan | None = None,
    *,
    micro_steps: int = 1,
    once_a_window: bool = False,
    **changes: Any,
) -> BucketMOO:
    return BucketMOO(
        config(**changes), blocks or plan(), exchange, lambda bucket, shard: None, micro_steps=lambda: micro_steps,
        once_a_window=once_a_window,
    )
