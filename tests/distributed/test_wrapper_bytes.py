"""Under FSDP2 bucket_moo sends the gradient bytes of plain FSDP2's reduce-scatter, flat, by node and with replicas; and
says itself what it sends, in all and between nodes.

Bytes are counted, see `benchmarks/traffic.py`: what every collective carried, charged by the standard algorithm's cost
per rank. Grams and control messages do not grow with the model and are asserted apart. N bytes of padded gradient, W
ranks, L a node, R replicas, E exchanges a window:

    plain, ours flat, ours in two stages        E (W-1)/W N
    of it between nodes, flat                   E (W-L)/W N
    of it between nodes, two stages             E (1/L - 1/W) N
    plain with replicas                         E ((W/R-1)/(W/R) + 2 (R-1)/W) N
    ours with replicas                          E (W-1)/W N + (R-1)/W N, the second in float32

The layers' sizes are drawn anew in every run, from a seed that a failure names and `BUCKETMOO_TEST_SEED` sets.
"""

from __future__ import annotations

import dataclasses

import pytest
from draw import SEED, Case, Key, parametrized
from outcomes import Outcomes, Results

from bucketmoo_ds.apps.planner import Setup, forecast

WORLD_SIZES = (2, 3, 4)
NIGHTLY = 3
INSIDE, REPLICAS = 2, 2
BY_NODE = [0, 0, 1, 1]

WINDOWS: dict[str, Case] = {
    "one": {},
    "two": {"micro_steps": 2},
    "once": {"micro_steps": 2, "once_a_window": True},
    "bf16": {"dtype": "bf16"},
}

STORAGES = ("float32", "bfloat16", "host")


def cases_of(world_size: int) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, window in WINDOWS.items():
        found[f"plain-{name}"] = window | {"register": False}
        found[f"flat-{name}"] = window | {"register": True}
        if world_size == 4:
            nodes = window | {"register": True, "ranks_per_node": INSIDE, "table": BY_NODE}
            found[f"nodes_flat-{name}"] = nodes | {"exchange": "flat"}
            found[f"nodes-{name}"] = nodes | {"exchange": "two_stage"}
            found[f"plain_replicas-{name}"] = window | {"register": False, "replicas": REPLICAS}
            found[f"replicas-{name}"] = window | {"register": True, "replicas": REPLICAS, "table": BY_NODE}
    found["flat-deferred"] = {"register": True, "mode": "deferred"}
    if world_size == 2:
        for storage in STORAGES:
            found[f"rows_{storage}-two"] = WINDOWS["two"] | {"register": True, "row_storage": storage}
    return {name: case | {"seed": SEED} for name, case in found.items()}


CASES: dict[Key, Case] = {
    (world_size, name): case for world_size in WORLD_SIZES for name, case in cases_of(world_size).items()
}
OURS = [key for key in CASES if CASES[key]["register"]]
DRAWN = [key for key in OURS if key[0] != NIGHTLY]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """With all plain runs."""
    return Outcomes(request, "count_wrapper_bytes.py", CASES, also=set(CASES) - set(OURS))


def explain(key: Key) -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {CASES[key]}"


def plain(outcomes: Outcomes, key: Key) -> Results:
    """Of the same windows."""
    window = key[1].split("-")[1]
    name = "plain_replicas" if key[1].startswith("replicas") else "plain"
    return outcomes[key[0], f"{name}-{window if window in WINDOWS else 'one'}"]


def padded(outcomes: Outcomes, key: Key) -> float:
    """E N: what plain FSDP2 sends on one mesh dimension is (W-1)/W of it, written out here for one exchange or two."""
    (sent,) = {result["sent"]["gradients"] for result in outcomes[key[0], f"plain-{key[1].split('-')[1]}"]}
    return sent * key[0] / (key[0] - 1)


every = parametrized(OURS, DRAWN)
without_replicas = parametrized([key for key in OURS if not key[1].startswith("replicas")], DRAWN)
on_four = pytest.mark.parametrize("window", WINDOWS)


@without_replicas
def test_gradient_bytes_are_those_of_plain_fsdp2(key: Key, outcomes: Outcomes) -> None:
    for ours, theirs in zip(outcomes[key], plain(outcomes, key), strict=True):
        assert ours["gradients"] == ours["sent"]["rows"] == theirs["gradients"] > 0, explain(key)
        # FSDP2 cuts every parameter along its first dimension into W equal parts, the last ones padded.
        world_size, case = key[0], CASES[key]
        exchanges = 1 if case.get("once_a_window") else case.get("micro_steps", 1)
        parts = sum(-(-shape[0] // world_size) * shape[1:].numel() for shape in ours["shapes"])
        width = 2 if case.get("dtype") == "bf16" else 4
        assert ours["gradients"] == exchanges * (world_size - 1) * parts * width, explain(key)


def gram_bytes(world_size: int, languages: int, ours: Case) -> int:
    """A Gram a bucket, float64, to everyone while streaming; deferred, to one rank, which tells it summed, with the
    weights."""
    if ours["streaming"]:
        return (world_size - 1) * ours["buckets"] * languages**2 * 8
    return (world_size - 1) * -(-ours["buckets"] // world_size) * (2 * languages**2 + languages) * 8


@every
def test_nothing_else_is_sent(key: Key, outcomes: Outcomes) -> None:
    """FSDP2 gathers parameters as before; Grams and control messages do not grow with the model."""
    world_size, case = key[0], CASES[key]
    languages = 2 if "table" in case else world_size
    for ours, theirs in zip(outcomes[key], plain(outcomes, key), strict=True):
        assert set(ours["sent"]) <= {"rows", "combined", "grams", "control", "parameters"}
        assert ("combined" in ours["sent"]) == ("replicas" in case)
        assert ours["sent"]["parameters"] == theirs["sent"]["parameters"]
        assert ours["sent"]["grams"] == gram_bytes(world_size, languages, ours), explain(key)
        # A header of 64-bit numbers to every rank a micro-step, and two digests a window.
        micro_steps = case.get("micro_steps", 1)
        assert ours["sent"]["control"] <= (world_size - 1) * (80 * micro_steps + 16), explain(key)


@every
def test_own_counters_say_what_the_collectives_carried(key: Key, outcomes: Outcomes) -> None:
    for result in outcomes[key]:
        assert {name: sent for name, sent in result["own"].items() if sent} == result["carried"], explain(key)
        between = {name: sent for name, sent in result["own_between"].items() if sent}
        assert between == {name: sent for name, sent in result["carried_between"].items() if sent}, explain(key)


@on_four
def test_bytes_between_nodes(window: str, outcomes: Outcomes) -> None:
    numel = padded(outcomes, (4, f"plain-{window}"))
    for flat, staged in zip(outcomes[4, f"nodes_flat-{window}"], outcomes[4, f"nodes-{window}"], strict=True):
        assert flat["carried_between"]["all_to_all"] == numel * (4 - INSIDE) / 4
        assert staged["carried_between"]["all_to_all (nodes)"] == numel * (1 / INSIDE - 1 / 4)
        assert staged["carried_between"]["reduce_scatter (node)"] == 0
        assert "all_to_all" not in staged["carried"]
        rows = staged["carried"]["reduce_scatter (node)"] + staged["carried"]["all_to_all (nodes)"]
        assert rows == flat["carried"]["all_to_all"] == numel * 3 / 4


@on_four
def test_replicas_send_no_more_than_plain_ones(window: str, outcomes: Outcomes) -> None:
    """Exactly as much where the wire is float32 and a window has one exchange, but for shards of an odd number of
    elements, which replicas do not divide; less where windows have several. In bf16 the combined gradient, which is
    float32, is twice as wide as what plain FSDP2 gathers."""
    case = WINDOWS[window]
    for ours, theirs in zip(outcomes[4, f"replicas-{window}"], outcomes[4, f"plain_replicas-{window}"], strict=True):
        exchanges = 1 if case.get("once_a_window") else case.get("micro_steps", 1)
        wire = 2 if case.get("dtype") == "bf16" else 4
        # Plain sends (1/2 + 2/4) N in each exchange.
        numel = theirs["gradients"] / exchanges
        expected = exchanges * 3 / 4 * numel + 1 / 4 * numel * 4 / wire
        odd = (exchanges * 3 * wire + 4) * ours["buckets"]
        assert expected <= ours["gradients"] <= expected + odd, explain((4, f"replicas-{window}"))
        if wire == 4:
            assert ours["gradients"] <= theirs["gradients"] + odd
        # Inside a replica goes what went there before: a language is a replica here.
        assert ours["carried_between"]["reduce_scatter (node)"] == 0
        assert set(ours["carried"]) >= {"reduce_scatter (node)", "all_to_all (nodes)", "all_gather (combined)"}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", ["flat", "two_stage", "replicas"])
def test_the_planner_says_so(layout: str, window: str, outcomes: Outcomes) -> None:
    """In units of what the plain run sends, in which the padding, that the planner does not know, stands on both sides;
    but for what replicas pad in addition."""
    case = dict(WINDOWS[window])
    measured = outcomes[4, {"flat": "nodes_flat", "two_stage": "nodes", "replicas": "replicas"}[layout] + f"-{window}"]
    theirs = outcomes[4, f"{'plain_replicas' if layout == 'replicas' else 'plain'}-{window}"]
    setup = Setup(
        world_size=4,
        ranks_per_node=INSIDE,
        languages=2,
        parameters=measured[0]["numel"],
        replicas=REPLICAS if layout == "replicas" else 1,
        buckets=measured[0]["buckets"],
        exchange="flat" if layout == "flat" else "two_stage",
        **case,
    )
    planned = forecast(setup)
    ours = planned.flat if layout == "flat" else planned.two_stage
    assert ours is not None
    for result, plain_result in zip(measured, theirs, strict=True):
        unit, planned_unit = plain_result["gradients"], planned.plain.sum.total
        total = ours.gradients.total + ours.combined.total
        # Rounding to whole elements a rank, and the odd elements of replicas' shards: a few of some hundred thousand.
        assert result["gradients"] / unit == pytest.approx(total / planned_unit, rel=1e-3)
        rows = [result["carried_between"].get(name, 0) for name in ("all_to_all", "all_to_all (nodes)")]
        assert sum(rows) / unit == pytest.approx(ours.gradients.between_nodes / planned_unit, rel=1e-3)
        combined = result["carried_between"].get("all_gather (combined)", 0)
        assert combined / unit == pytest.approx(ours.combined.between_nodes / planned_unit, rel=1e-3)
        assert result["sent"]["grams"] == ours.grams.total


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_take_what_the_planner_says(storage: str, outcomes: Outcomes) -> None:
    """In device or host memory, to the byte, once it is told the padded elements, which only plain FSDP2's bytes tell.
    The numbers are proportional to the elements, so they hold for 8B of them as for these."""
    exchanges, width = 2, 4
    parameters = round(padded(outcomes, (2, "plain-two")) / exchanges / width)
    setup = Setup(world_size=2, ranks_per_node=2, languages=2, parameters=parameters, micro_steps=exchanges)
    planned = forecast(setup).memory[storage]
    rows = planned.host if storage == "host" else planned.device
    large = forecast(dataclasses.replace(setup, parameters=8 * 10**9)).memory[storage]
    assert (large.host if storage == "host" else large.device) == pytest.approx(rows * 8 * 10**9 / parameters, rel=1e-4)
    for result in outcomes[2, f"rows_{storage}-two"]:
        assert result["row_bytes"] == rows, explain((2, f"rows_{storage}-two"))


@parametrized([key for key in OURS if key[1].startswith(("flat", "rows"))], DRAWN)
def test_sockets_sent_what_was_counted(key: Key, outcomes: Outcomes) -> None:
    """Nothing was sent by a collective that the count does not know. In two stages gloo sends more than is counted: its
    reduce-scatter is an all-reduce inside."""
    world_size, results = key[0], outcomes[key]
    counted, sockets, calls = (sum(result[what] for result in results) for what in ("counted", "sockets", "calls"))
    # gloo puts a header before every message; a call takes up to 2 (W - 1) messages, and a barrier follows.
    headers = 1000 * (world_size - 1) * (calls + world_size)
    assert 0.999 * counted <= sockets <= counted + headers, explain(key)
    assert headers < 0.5 * counted, "the allowance would hide a reduction of the gradients"
