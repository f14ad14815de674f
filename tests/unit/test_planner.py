"""The planner: its formulas against collectives that are run by hand, and what every layout must keep."""

from __future__ import annotations

import collections
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.adapters.table import EVERY_MICRO_STEP, FRAMEWORKS
from bucketmoo_ds.apps.planner import Forecast, Sent, Setup, forecast
from bucketmoo_ds.data.schedule import LanguageSchedule
from bucketmoo_ds.errors import ConfigError

CLUSTERS = [(4, 2), (4, 4), (4, 1), (6, 3), (8, 2), (8, 4), (9, 3), (12, 4), (16, 8), (1, 1)]


def make(**changes: object) -> Forecast:
    return forecast(Setup(**{"world_size": 8, "ranks_per_node": 2, "languages": 4, "parameters": 8000} | changes))


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Any cluster, framework and window."""
    framework = draw(st.sampled_from(FRAMEWORKS))
    ranks = st.integers(1, 8) if framework.plain else st.just(1)
    per_node, nodes = draw(ranks), draw(ranks)
    world_size = per_node * nodes
    replicas = [each for each in range(1, world_size + 1) if world_size % each == 0]
    return Setup(
        world_size=world_size,
        ranks_per_node=per_node,
        languages=draw(st.integers(1, 30)),
        parameters=draw(st.integers(1, 10**11)),
        micro_steps=draw(st.integers(1, 6)),
        once_a_window=draw(st.booleans()) and framework.exchanged != EVERY_MICRO_STEP,
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
        framework=framework.name,
        stage=framework.stage,
        replicas=1 if framework.no_replicas else draw(st.sampled_from(replicas)),
        buckets=draw(st.integers(1, 50)),
        blocks=draw(st.integers(0, 500)),
        exchange=draw(st.sampled_from(["auto", "flat", *["two_stage"] * (1 < per_node < world_size)])),
    )


# --- bytes, against collectives run by hand ---------------------------------------------------------------------------


class Wire:
    """Ranks with gradients in their hands; a message counts where it is sent."""

    def __init__(self, world_size: int, per_node: int, slice_numel: int, itemsize: int) -> None:
        self.world_size, self.per_node, self.itemsize = world_size, per_node, itemsize
        self.total: collections.Counter[int] = collections.Counter()
        self.between: collections.Counter[int] = collections.Counter()
        # [rank, slice, element]: whole numbers, so that every order of adding up gives the same.
        self.gradients = np.random.default_rng().integers(-1000, 1000, (world_size, world_size, slice_numel))

    def send(self, source: int, target: int, data: np.ndarray, itemsize: int = 0) -> np.ndarray:
        if source != target:
            size = data.size * (itemsize or self.itemsize)
            self.total[source] += size
            self.between[source] += size * (source // self.per_node != target // self.per_node)
        return data.copy()

    def ring_reduce_scatter(self, group: list[int], parts: dict[int, list[np.ndarray]]) -> dict[int, np.ndarray]:
        """Every rank has a part for each member; the member at position i ends with the sum of all parts i."""
        size = len(group)
        held = {rank: [part.copy() for part in parts[rank]] for rank in group}
        for step in range(size - 1):
            arriving = []
            for position, rank in enumerate(group):
                right, part = group[(position + 1) % size], (position - step - 1) % size
                arriving.append((held[right][part], self.send(rank, right, held[rank][part])))
            for so_far, data in arriving:
                np.add(so_far, data, out=so_far)
        return {rank: held[rank][position] for position, rank in enumerate(group)}

    def ring_all_gather(self, group: list[int], shards: dict[int, np.ndarray], itemsize: int = 0) -> None:
        """Checks that every rank ends with all shards."""
        size = len(group)
        held = {rank: {position: shards[rank]} for position, rank in enumerate(group)}
        for step in range(size - 1):
            for position, rank in enumerate(group):
                right, part = group[(position + 1) % size], (position - step) % size
                held[right][part] = self.send(rank, right, held[rank][part], itemsize)
        for rank in group:
            for position, owner in enumerate(group):
                assert np.array_equal(held[rank][position], shards[owner])

    def all_to_all(self, group: list[int], parts: dict[int, list[np.ndarray]]) -> dict[int, list[np.ndarray]]:
        return {
            rank: [self.send(source, rank, parts[source][position]) for source in group]
            for position, rank in enumerate(group)
        }

    @property
    def sent(self) -> Sent:
        """The average over the ranks, which has to be a whole number here."""
        totals = [sum(counter.values()) / self.world_size for counter in (self.total, self.between)]
        assert all(number == int(number) for number in totals)
        return Sent(*map(int, totals))


def wire_of(setup: Setup) -> Wire:
    itemsize = {"fp32": 4, "bf16": 2}[setup.dtype]
    assert setup.parameters % setup.world_size == 0
    return Wire(setup.world_size, setup.ranks_per_node, setup.parameters // setup.world_size, itemsize)


def run_flat(wire: Wire) -> None:
    received = wire.all_to_all(
        list(range(wire.world_size)), {rank: list(wire.gradients[rank]) for rank in range(wire.world_size)}
    )
    for rank, slices in received.items():
        assert np.array_equal(slices, wire.gradients[:, rank])


def run_two_stage(wire: Wire) -> None:
    """Part i of the first stage is what the ranks at position i of all nodes need."""
    per_node, nodes = wire.per_node, wire.world_size // wire.per_node
    summed: dict[int, np.ndarray] = {}
    for node in range(nodes):
        group = list(range(node * per_node, (node + 1) * per_node))
        parts = {rank: [wire.gradients[rank][position::per_node] for position in range(per_node)] for rank in group}
        summed |= wire.ring_reduce_scatter(group, parts)
    for position in range(per_node):
        group = list(range(position, wire.world_size, per_node))
        received = wire.all_to_all(group, {rank: list(summed[rank]) for rank in group})
        for rank, slices in received.items():
            of_nodes = wire.gradients[:, rank].reshape(nodes, per_node, -1).sum(axis=1)
            assert np.array_equal(slices, of_nodes)


def run_reduce_scatter(wire: Wire, replicas: int = 1) -> dict[int, np.ndarray]:
    shards = wire.world_size // replicas
    found: dict[int, np.ndarray] = {}
    for first in range(0, wire.world_size, shards):
        group = list(range(first, first + shards))
        parts = {rank: np.split(wire.gradients[rank], shards) for rank in group}
        found |= wire.ring_reduce_scatter(group, parts)
    return found


def run_all_reduce(wire: Wire, group: list[int], values: dict[int, np.ndarray]) -> None:
    parts = {rank: np.array_split(values[rank], len(group)) for rank in group}
    wire.ring_all_gather(group, wire.ring_reduce_scatter(group, parts))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "per_node"), CLUSTERS)
def test_flat_and_two_stage_send_what_the_collectives_carry(world_size: int, per_node: int, dtype: str) -> None:
    found = make(
        world_size=world_size, ranks_per_node=per_node, parameters=world_size * per_node * 3, dtype=dtype, micro_steps=1
    )
    wire = wire_of(found.setup)
    run_flat(wire)
    assert found.flat.gradients == wire.sent
    if found.two_stage is not None:
        wire = wire_of(found.setup)
        run_two_stage(wire)
        assert found.two_stage.gradients == wire.sent


@pytest.mark.parametrize(("world_size", "per_node"), CLUSTERS)
def test_plain_reduce_scatter_and_all_reduce(world_size: int, per_node: int) -> None:
    # Slices of a multiple of L elements: averages between nodes are then whole.
    options = {"world_size": world_size, "ranks_per_node": per_node, "parameters": world_size * per_node * 5}
    everyone = list(range(world_size))
    for arm in ({"framework": "fsdp2"}, {"framework": "fsdp1"}, {"framework": "deepspeed", "stage": 3}):
        found = make(**options, **arm)
        wire = wire_of(found.setup)
        for rank, shard in run_reduce_scatter(wire).items():
            assert np.array_equal(shard[0], wire.gradients[:, rank].sum(axis=0))
        assert found.plain.sum == wire.sent
    for arm in ({"framework": "ddp"}, {"framework": "deepspeed", "stage": 2}):
        found = make(**options, **arm)
        wire = wire_of(found.setup)
        run_all_reduce(wire, everyone, dict(enumerate(wire.gradients)))
        assert found.plain.sum == wire.sent


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world_size", "per_node", "replicas"),
    [(8, 4, 2), (8, 2, 2), (8, 4, 4), (8, 2, 8), (16, 4, 4), (12, 6, 3), (4, 4, 2)],
)
def test_replicas(world_size: int, per_node: int, replicas: int, dtype: str) -> None:
    """The natural node, several nodes a replica, several replicas a node, a replica that lies on two nodes."""
    found = make(
        world_size=world_size,
        ranks_per_node=per_node,
        replicas=replicas,
        parameters=world_size * replicas * per_node * 3,
        dtype=dtype,
    )
    wire, shards = wire_of(found.setup), world_size // replicas
    scattered = run_reduce_scatter(wire, replicas)
    for first in range(shards):
        group = list(range(first, world_size, shards))
        run_all_reduce(wire, group, {rank: scattered[rank].reshape(-1) for rank in group})
    assert found.plain.sum == wire.sent

    wire = wire_of(found.setup)
    for first in range(shards):
        group = list(range(first, world_size, shards))
        wire.ring_all_gather(group, {rank: wire.gradients[rank][0] for rank in group}, itemsize=4)
    assert found.flat.combined == wire.sent
    if dtype == "fp32":
        assert found.flat.gradients.total + found.flat.combined.total == found.plain.sum.total


@pytest.mark.parametrize(("world_size", "per_node"), CLUSTERS)
def test_ddp_gathers_combined_shards(world_size: int, per_node: int) -> None:
    found = make(
        world_size=world_size, ranks_per_node=per_node, parameters=world_size * per_node * 5, framework="ddp"
    )
    wire = wire_of(found.setup)
    wire.ring_all_gather(list(range(world_size)), {rank: wire.gradients[rank][0] for rank in range(world_size)})
    assert found.flat.combined == wire.sent
    assert found.flat.gradients.total + found.flat.combined.total == found.plain.sum.total


@pytest.mark.parametrize("languages", [2, 5])
@pytest.mark.parametrize(("world_size", "per_node"), CLUSTERS)
def test_grams(world_size: int, per_node: int, languages: int) -> None:
    """Each rank's blocks to it from everyone, and their sums, with the weights, to everyone."""
    blocks = 7 * per_node
    found = make(
        world_size=world_size, ranks_per_node=per_node, languages=languages, blocks=blocks, micro_steps=languages
    )
    a_rank = math.ceil(blocks / world_size)
    wire = Wire(world_size, per_node, a_rank * languages**2, itemsize=8)
    run_flat(wire)
    decided = np.zeros(a_rank * languages * (languages + 1))
    wire.ring_all_gather(list(range(world_size)), dict.fromkeys(range(world_size), decided))
    sums = [sum(counter.values()) / world_size for counter in (wire.total, wire.between)]
    assert [found.flat.grams.total, found.flat.grams.between_nodes] == [round(each) for each in sums]


@pytest.mark.parametrize(("stage", "micro_steps"), [(2, 1), (2, 4), (1, 4), (0, 4)])
def test_zero_as_theory_says(stage: int, micro_steps: int) -> None:
    """docs/theory.md, section 8: plain `2 (W-1)/W N` an exchange; ours `(W-1)/W N`, and at most `N/W` a window; at
    W = 2 together `1/2 + 1/(2 M)` of plain, where M counts exchanges."""
    found = make(
        world_size=2, ranks_per_node=2, framework="deepspeed", stage=stage, micro_steps=micro_steps, parameters=2**20
    )
    exchanges, gradient_bytes = (micro_steps if stage == 2 else 1), 4 * 2**20
    assert found.plain.sum.total == exchanges * gradient_bytes
    assert found.flat.gradients.total == exchanges * gradient_bytes // 2
    assert found.flat.combined == Sent(gradient_bytes // 2, 0)
    ratio = (found.flat.gradients.total + found.flat.combined.total) / found.plain.sum.total
    assert ratio == 1 / 2 + 1 / (2 * exchanges)


# --- what always holds ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(setups())
def test_two_stages_send_as_much_as_flat_and_less_between_nodes(setup: Setup) -> None:
    found = forecast(setup)
    flat, stages = found.flat, found.two_stage
    assert flat.gradients.between_nodes <= flat.gradients.total
    assert (stages is None) == (setup.nodes in (1, setup.world_size))
    if stages is None:
        assert found.exchange == "flat"
        return
    assert stages.gradients.total == flat.gradients.total
    assert stages.gradients.between_nodes * setup.ranks_per_node == flat.gradients.between_nodes
    assert stages.combined == flat.combined
    assert stages.grams.total <= flat.grams.total


@settings(deadline=None, max_examples=100)
@given(setups())
def test_gradients_never_exceed_the_plain_run(setup: Setup) -> None:
    """Even between nodes, where gradients go by node."""
    found = forecast(setup)
    assert found.flat.gradients.total <= found.plain.sum.total
    if found.two_stage is not None:
        assert found.two_stage.gradients.between_nodes <= found.plain.sum.between_nodes
    if setup.framework in ("fsdp1", "fsdp2") and setup.replicas == 1:
        assert found.flat.gradients.total == found.plain.sum.total


@settings(deadline=None, max_examples=100)
@given(setups(), st.integers(0, 5))
def test_layout(setup: Setup, window: int) -> None:
    found = forecast(setup)
    layout = np.array(found.layout(window))
    width = setup.nodes if found.exchange == "two_stage" else setup.world_size
    assert layout.shape == (setup.micro_steps, width)
    if setup.exchanges == 1:
        assert (layout == layout[0]).all()
        layout = layout[:1]
    counts = np.bincount(layout.ravel(), minlength=setup.languages)
    assert len(counts) == setup.languages
    assert counts.max() - counts.min() <= 1
    assert np.count_nonzero(counts) == min(layout.size, setup.languages) == found.languages_of_a_window


@settings(deadline=None, max_examples=100)
@given(setups())
def test_in_rotation_all_languages_come_as_soon_as_can_be(setup: Setup) -> None:
    found = forecast(setup)
    windows = math.ceil(setup.languages / found.languages_of_a_window)
    assert {*np.ravel([found.layout(window) for window in range(windows)])} == set(range(setup.languages))


@settings(deadline=None, max_examples=100)
@given(setups())
def test_the_schedule_has_the_plans_places(setup: Setup) -> None:
    """Languages of equal size: the schedule's first window covers as many, with the same shares."""
    found = forecast(setup)
    by_node = found.exchange == "two_stage"
    table = LanguageSchedule(
        [f"l{index}" for index in range(setup.languages)],
        [setup.micro_steps * setup.world_size] * setup.languages,
        world_size=setup.world_size,
        micro_steps=setup.micro_steps,
        micro_batch_size=1,
        affinity="window" if setup.exchanges < setup.micro_steps else "micro_step",
        ranks_per_node=setup.ranks_per_node if by_node else 1,
    ).table(0, 0)
    ours = np.repeat(found.layout(), setup.ranks_per_node if by_node else 1, axis=1)
    assert table.shape == ours.shape
    shares = [sorted(np.bincount(each.ravel(), minlength=setup.languages)) for each in (table, ours)]
    assert shares[0] == shares[1]


@settings(deadline=None, max_examples=200)
@given(setups())
def test_the_choice(setup: Setup) -> None:
    found = forecast(setup)
    on_nodes = setup.exchanges * setup.nodes >= setup.languages
    if setup.exchange == "auto":
        assert (found.exchange == "two_stage") == (setup.several_nodes and on_nodes)
    else:
        assert found.exchange == setup.exchange
    shared = setup.several_nodes and found.exchange == "flat"
    assert any("ranks of a node" in text for text in found.warnings) == shared
    uncovered = found.languages_of_a_window < setup.languages
    assert any("a window covers" in text for text in found.warnings) == uncovered
    assert any("one language" in text for text in found.warnings) == (setup.languages == 1)


@pytest.mark.parametrize(
    ("changes", "exchange", "reason"),
    [
        ({}, "two_stage", "4 places of a whole node for 4 languages"),
        ({"languages": 5}, "flat", "4 places of a whole node for 5 languages, too few"),
        ({"languages": 5, "micro_steps": 2}, "two_stage", "8 places"),
        ({"languages": 5, "micro_steps": 2, "once_a_window": True}, "flat", "4 places"),
        ({"languages": 5, "micro_steps": 2, "framework": "deepspeed", "stage": 1}, "flat", "4 places"),
        ({"ranks_per_node": 8}, "flat", "all ranks are on one node"),
        ({"ranks_per_node": 1}, "flat", "every rank is a node of its own"),
        ({"exchange": "flat"}, "flat", "asked for"),
        ({"languages": 9, "exchange": "two_stage"}, "two_stage", "asked for"),
    ],
)
def test_what_auto_takes(changes: dict, exchange: str, reason: str) -> None:
    found = make(**changes)
    assert found.exchange == exchange
    assert reason in found.reason


def test_ways_out_lead_out() -> None:
    """What a warning advises makes it go away."""
    assert "use micro_steps = 3; exchange" in make(languages=9).warnings[0]
    assert "takes 4 of 9 languages a window" in make(languages=9).warnings[0]
    assert make(languages=9, micro_steps=3).warnings == ()
    assert "covers 8 of 9 languages" in make(languages=9).warnings[1]
    assert make(languages=9).warnings[1].endswith("use micro_steps = 2")
    assert len(make(languages=9, micro_steps=2).warnings) == 1
    assert make(exchange="flat").warnings[0].endswith('use exchange = "auto"')
    local = make(languages=9, micro_steps=4, once_a_window=True)
    assert "exchange in every micro-step" in local.warnings[0]
    assert "micro_steps = 4" in local.warnings[0]
    assert make(languages=9, micro_steps=4).warnings == ()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_the_rows() -> None:
    """facts.md: 8B parameters, W = 8: 8 GB at K = 2, 32 GB at K = 8."""
    for languages, kept in ((2, 8 * 10**9), (8, 32 * 10**9)):
        found = make(ranks_per_node=8, languages=languages, parameters=8 * 10**9, buckets=40)
        assert found.memory["float32"].device == kept
        assert found.memory["bfloat16"].device == kept // 2
        assert found.memory["host"].host == kept
        # One bucket of 40 at a time, float32.
        assert found.memory["host"].device == found.memory["streaming"].device == kept // 40
        assert found.memory["float32"].host == found.memory["streaming"].host == 0
    assert "streaming" not in make(micro_steps=2).memory
    assert "streaming" in make(micro_steps=2, once_a_window=True).memory


def test_crossed_grams_have_two_rows_a_language() -> None:
    plain, crossed = (make(languages=4, micro_steps=2, gram=gram) for gram in ("plain", "cross"))
    for storage in ("float32", "bfloat16"):
        assert crossed.memory[storage].device == 2 * plain.memory[storage].device
    # 8 ranks, 2 micro-steps: 8 rows go out, Grams and weights of 4 languages come back.
    assert plain.flat.grams.total * (64 + 20) == crossed.flat.grams.total * (16 + 20)
    assert crossed.warnings == ()
    few, same = (make(languages=4, gram=gram, world_size=4, ranks_per_node=4) for gram in ("cross", "plain"))
    assert few.memory["streaming"].device == same.memory["streaming"].device
    assert "no second half" in few.warnings[0]
    assert "use micro_steps = 2" in few.warnings[0]


def test_on_the_device_only_a_windows_languages_but_kept_are_all() -> None:
    found = make(languages=20, world_size=4, ranks_per_node=4, parameters=4000, buckets=10)
    assert found.memory["float32"].device == 20 * 1000 * 4
    assert found.memory["streaming"].device == 4 * 100 * 4


# --- input and output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0}, "world_size = 0: expected a whole number, 1 or more"),
        ({"languages": True}, "languages = True"),
        ({"parameters": 1.5}, "parameters = 1.5"),
        ({"micro_steps": 0}, "micro_steps = 0"),
        ({"buckets": 0}, "buckets = 0"),
        ({"blocks": -1}, "blocks = -1: expected a whole number, 0 or more"),
        ({"ranks_per_node": 3}, "ranks_per_node = 3: world_size = 8 is no multiple of it"),
        ({"ranks_per_node": 16}, "ranks_per_node = 16: world_size = 8"),
        ({"replicas": 3}, "replicas = 3: world_size = 8"),
        ({"dtype": "fp16"}, 'dtype = "fp16": unknown, expected one of "fp32", "bf16"'),
        ({"exchange": "two_stages"}, 'exchange = "two_stages": unknown, .* did you mean "two_stage"'),
        ({"framework": "fsdp"}, 'framework = "fsdp": unknown'),
        ({"framework": "deepspeed"}, "stage = None: expected 0, 1, 2 or 3"),
        ({"framework": "deepspeed", "stage": 4}, "stage = 4: expected 0, 1, 2 or 3"),
        ({"stage": 2}, 'stage = 2: "fsdp2" has no stages'),
        ({"framework": "fsdp1", "replicas": 2}, 'replicas = 2: not with "fsdp1", its HYBRID strategies take no hook'),
        ({"framework": "ddp", "replicas": 2}, 'replicas = 2: not with "ddp"'),
        ({"framework": "deepspeed", "stage": 2, "once_a_window": True}, "on ZeRO-2 gradients are exchanged in every"),
        ({"exchange": "two_stage", "ranks_per_node": 8}, '"two_stage": 8 ranks with 8 a node are not several nodes'),
        ({"exchange": "two_stage", "ranks_per_node": 1}, "8 ranks with 1 a node"),
        ({"framework": "single"}, 'world_size = 8: framework = "single" is one process; use 1'),
    ],
)
def test_errors_name_the_setting(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(setups())
def test_json(setup: Setup) -> None:
    found = forecast(setup)
    text = json.loads(json.dumps(found.to_json()))
    assert text["setup"]["world_size"] == setup.world_size
    assert np.array_equal(text["layout"], found.layout())
    assert text["flat"]["gradients"]["total"] == found.flat.gradients.total
    assert text["warnings"] == list(found.warnings)
