"""bucket_moo sends no more bytes of gradients than plain DeepSpeed in the same run, and spreads rows evenly.

Bytes are counted, see `benchmarks/traffic.py`: what every collective carried, charged by the standard algorithm's cost
per rank, held against bucket_moo's own counters and against what the kernel says the sockets sent. "Gradient bytes"
are DeepSpeed's all-reduced gradients, or bucket_moo's rows and combined pieces. Grams and control messages do not grow
with the model and are asserted apart; the gathering of updated parameters is the same on both sides.

N bytes of gradient, W ranks, E exchanges a window (the micro-steps on ZeRO-2 and 3, 1 on ZeRO-0 and 1):

    ZeRO-0    both        2 (W-1)/W N
    ZeRO-1/2  plain       E 2 (W-1)/W N
              bucket_moo  E (W-1)/W N   and, once a window, the part of this rank's shards that others own, N/W at most
    ZeRO-3    both        E (W-1)/W N   exactly, with every parameter padded to W equal chunks

The layers' sizes are drawn anew in every run, from a seed that a failure names and `BUCKETMOO_TEST_SEED` sets.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from draw import SEED, Case, Key, pairwise, parametrized
from outcomes import Outcomes, Results

from bucketmoo_ds.comm.exchange import ALIGNMENT

FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": (2, 3, 4),
    "stage": (1, 2, 3),
    "micro_steps": (1, 3),
    "dtypes": (("fp32", None), ("bf16", None), ("bf16", "fp32")),
}


def keyed(drawn: Case) -> tuple[Key, Case]:
    case = dict(drawn)
    world_size = case.pop("world_size")
    case["dtype"], case["accumulate"] = case.pop("dtypes")
    return (world_size, "-".join(map(str, case.values()))), case


CASES: dict[Key, Case] = dict(
    keyed(dict(zip(FACTORS, values, strict=True))) for values in itertools.product(*FACTORS.values())
)
# On two numbers of ranks. The nightly list has all.
WORLD_SIZES = (2, random.Random(SEED).choice((3, 4)))
DRAWN = [keyed(drawn)[0] for drawn in pairwise(FACTORS | {"world_size": WORLD_SIZES})]
# Plain ZeRO-0 takes float32 for what it accumulates in 16 bits, or refuses: float32 alone shows what we send.
ZERO0: dict[Key, Case] = dict(
    keyed({"world_size": world_size, "stage": 0, "micro_steps": micro_steps, "dtypes": ("fp32", None)})
    for world_size, micro_steps in ((WORLD_SIZES[1], 1), (2, 3))
)
CASES |= ZERO0
DRAWN += ZERO0
THREE_QUARTERS: Key = (2, "2-1-fp32-None")

every_stage = parametrized(CASES, DRAWN)
zero12 = parametrized([key for key in CASES if CASES[key]["stage"] in (1, 2)], DRAWN)
zero3 = parametrized([key for key in CASES if CASES[key]["stage"] == 3], DRAWN)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    cases = {key: case | {"seed": SEED} for key, case in CASES.items()}
    return Outcomes(request, "count_bytes.py", cases, also=[THREE_QUARTERS])


@pytest.fixture
def results(key: Key, outcomes: Outcomes) -> Results:
    found = outcomes[key]
    for result in found:
        assert "error" not in result, f"{result}, {explain(key)}"
    return found


def explain(key: Key) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {CASES[key]}"


def exchanges(case: dict[str, Any]) -> int:
    return 1 if case["stage"] < 2 else int(case["micro_steps"])


def element_sizes(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of an element on the wire: of a row, which is what autograd gave, and of the combined gradient, which is
    what DeepSpeed accumulates in."""
    wire = 4 if case["dtype"] == "fp32" else 2
    return wire, 4 if case["accumulate"] == "fp32" else wire


def padded(moo: dict[str, Any], world_size: int) -> int:
    """Elements of all buckets with shards of whole multiples of the alignment: written out here, not asked for."""
    return sum(world_size * ALIGNMENT * -(-numel // (world_size * ALIGNMENT)) for numel in moo["buckets"])


@zero12
def test_no_rank_sends_more_gradient_bytes_than_plain_deepspeed(key: Key, results: Results) -> None:
    """One case is at the limit: a float32 result of bf16 rows, one exchange, two ranks. Its pieces are twice as wide as
    its rows, so the mean over the ranks is the plain bytes and the padding, and one rank may send more than the other.
    """
    world_size, case = key[0], CASES[key]
    ours, plain = ([result[name]["gradients"] for result in results] for name in ("moo", "plain"))
    if case["accumulate"] == "fp32" and exchanges(case) == 1 and world_size == 2:
        moo = results[0]["moo"]
        assert sum(ours) <= sum(plain) * padded(moo, world_size) / sum(moo["buckets"]), explain(key)
    else:
        assert all(sent <= baseline for sent, baseline in zip(ours, plain, strict=True)), explain(key)


@zero12
def test_bytes_are_those_of_the_formula(key: Key, results: Results) -> None:
    world_size, case = key[0], CASES[key]
    row_size, combined_size = element_sizes(case)
    for result in results:
        plain, moo = result["plain"], result["moo"]
        numel = plain["numel"]
        assert sum(moo["buckets"]) == numel
        # Each of DeepSpeed's few all-reduces is rounded to whole bytes; its BF16_Optimizer, which ZeRO-1 takes for
        # float32 accumulation, pads the model to a multiple of 2 W elements.
        per_element = exchanges(case) * 2 * (world_size - 1) / world_size * row_size
        slack = plain["calls"] + (2 * world_size * per_element if case["stage"] == 1 and case["accumulate"] else 0)
        assert plain["gradients"] == pytest.approx(numel * per_element, abs=slack), explain(key)
        rows = exchanges(case) * (world_size - 1) * padded(moo, world_size) // world_size * row_size
        assert moo["sent"]["rows"] == rows, explain(key)
        assert moo["sent"]["combined"] <= sum(moo["held"]) * combined_size, explain(key)
    # Of what lies with one owner, every rank but the owner sends its part: N/W (W-1)/W for each rank. A bucket across
    # a border between partitions may send less, for a part of it already lies where it belongs.
    combined = sum(result["moo"]["sent"]["combined"] for result in results)
    most = padded(results[0]["moo"], world_size) * (world_size - 1) / world_size * combined_size
    # The W - 1 borders lie in W - 1 buckets at most; a bucket's padding is below a unit of alignment for every rank.
    buckets = results[0]["moo"]["buckets"]
    padding = world_size * ALIGNMENT * len(buckets)
    least = most - ((world_size - 1) * max(buckets) + padding) * combined_size
    assert least <= combined <= most, explain(key)


@pytest.mark.parametrize("key", ZERO0, ids=str)
def test_zero0_sends_what_its_all_reduce_sends(key: Key, results: Results) -> None:
    """Once a window, half of it rows and half combined, with every bucket padded."""
    world_size = key[0]
    for result in results:
        plain, moo = result["plain"], result["moo"]
        part = (world_size - 1) * padded(moo, world_size) // world_size * 4
        assert moo["sent"]["rows"] == moo["sent"]["combined"] == part, explain(key)
        expected = plain["numel"] * 4 * 2 * (world_size - 1) / world_size
        assert plain["gradients"] == pytest.approx(expected, abs=plain["calls"]), explain(key)


@zero3
def test_zero3_sends_what_its_reduce_scatter_sends(key: Key, results: Results) -> None:
    """To the byte: each rank sends every other one its chunk of every parameter, and nothing is sent on."""
    world_size, case = key[0], CASES[key]
    row_size, _ = element_sizes(case)
    for result in results:
        plain, moo = result["plain"], result["moo"]
        chunks = sum(-(-numel // world_size) for numel in moo["parameters"])
        assert sum(moo["parameters"]) == sum(moo["buckets"]) == plain["numel"]
        assert moo["sent"]["rows"] == exchanges(case) * (world_size - 1) * chunks * row_size, explain(key)
        assert moo["gradients"] == moo["sent"]["rows"] == plain["gradients"], explain(key)
        assert "combined" not in moo["sent"]
        assert set(moo["sent"]) == {"rows", "grams", "control", "parameters"}


def test_three_quarters_of_plain_on_two_ranks(outcomes: Outcomes) -> None:
    found = outcomes[THREE_QUARTERS]
    ours, plain = (sum(result[name]["gradients"] for result in found) for name in ("moo", "plain"))
    moo = found[0]["moo"]
    allowance = padded(moo, 2) / sum(moo["buckets"])
    # 0.5 for the rows; 0.25 for the combined pieces, less what of the bucket across the border is in place already.
    border = 0.25 * max(moo["buckets"]) / sum(moo["buckets"])
    assert 0.75 - border <= ours / plain <= 0.75 * allowance, f"{ours / plain}, {explain(THREE_QUARTERS)}"


@every_stage
def test_grams_and_control_are_small_and_do_not_grow_with_the_model(key: Key, results: Results) -> None:
    world_size, case = key[0], CASES[key]
    for result in results:
        moo = result["moo"]
        # One Gram a bucket, K = W languages, float64: to everyone while streaming; deferred, to one rank, which tells
        # everyone the sum, with the weights.
        languages, blocks = world_size, len(moo["buckets"])
        a_rank = -(-blocks // world_size) * (2 * languages**2 + languages)
        grams = blocks * languages**2 if moo["streaming"] else a_rank
        assert moo["sent"]["grams"] == (world_size - 1) * grams * 8, explain(key)
        # A header of a few 64-bit numbers to every rank a micro-step, and two digests and DeepSpeed's norm a window.
        assert moo["sent"]["control"] <= (world_size - 1) * (80 * case["micro_steps"] + 32), explain(key)


@parametrized([key for key in CASES if CASES[key]["stage"]], DRAWN)
def test_parameters_are_gathered_as_before(key: Key, results: Results) -> None:
    for result in results:
        assert result["moo"]["sent"]["parameters"] == result["plain"]["sent"]["parameters"] > 0, explain(key)


@every_stage
def test_own_counters_say_what_the_collectives_carried(key: Key, results: Results) -> None:
    for result in results:
        assert result["moo"]["own"] == result["moo"]["carried"], explain(key)


@every_stage
def test_sockets_sent_what_was_counted(key: Key, results: Results) -> None:
    """Nothing was sent by a collective that the count does not know. Plain ZeRO-3 is left out: gloo's reduce-scatter is
    an all-reduce inside, and sends more than a reduce-scatter has to."""
    world_size = key[0]
    for name in ("plain", "moo") if CASES[key]["stage"] < 3 else ("moo",):
        counted, sockets, calls = (
            sum(result[name][what] for result in results) for what in ("counted", "sockets", "calls")
        )
        # gloo puts a header before every message; a call takes up to 2 (W - 1) messages, and a barrier follows.
        headers = 1000 * (world_size - 1) * (calls + world_size)
        assert 0.999 * counted <= sockets <= counted + headers, f"{name}, {explain(key)}"
        assert headers < 0.5 * counted, "the allowance would hide a reduction of the gradients"


@zero12
def test_rows_are_spread_evenly(key: Key, results: Results) -> None:
    world_size = key[0]
    assert len({tuple(result["moo"]["rows_calls"]) for result in results}) == 1, "as much for every rank"
    for number, numel in enumerate(results[0]["moo"]["buckets"]):
        held = [result["moo"]["held"][number] for result in results]
        assert sum(held) == numel
        # No rank holds more than its even share, rounded up to the alignment; only the last ones may hold less.
        assert max(held) < numel / world_size + ALIGNMENT, explain(key)
        assert held == sorted(held, reverse=True)
