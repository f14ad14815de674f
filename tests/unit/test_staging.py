"""From gradients that come one by one to buckets: every gradient in its place, complete buckets as soon as it is their
turn, each once, however they come; and with ranks that add up their micro-steps, each language's sums apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.simulated_ranks import SimulatedExchange, run_ranks

from bucketmoo_ds.adapters.staging import Gathering, Staging
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.pipeline.window import Window
from bucketmoo_ds.plan.blocks import BlockPlan, Parameter, plan_blocks
from bucketmoo_ds.plan.layout import Chunked, Consecutive, Layout

CPU = torch.device("cpu")


def layout_of(plan: BlockPlan, chunks: int) -> Layout:
    """Of parameters in a row, or, as ZeRO-3 lays them out, each cut into so many chunks."""
    if chunks:
        return Chunked(plan, chunks, [-(-each.numel // chunks) for each in plan.parameters])
    return Consecutive(plan, [bucket.numel + 3 for bucket in plan.buckets])


def expected_flat(
    plan: BlockPlan, bucket: int, values: dict[int, Tensor], dtype: torch.dtype = torch.float32, chunks: int = 0
) -> Tensor:
    parts = [
        values.get(index, torch.zeros(plan.parameters[index].numel)).flatten().to(dtype)
        for index in plan.buckets[bucket].parameters
    ]
    if not chunks:
        return torch.cat([*parts, torch.zeros(3, dtype=dtype)])
    padded = [torch.nn.functional.pad(part, (0, -len(part) % chunks)) for part in parts]
    return torch.cat([part.view(chunks, -1) for part in padded], dim=1).flatten()


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=9)
layouts = st.integers(0, 5)  # chunks of a parameter, or 0 for parameters in a row


def plan_of(numels: list[int], bucket_size: int = 15) -> BlockPlan:
    return plan_blocks([Parameter(f"p{index}", numel) for index, numel in enumerate(numels)], bucket_size, "bucket")


# --- the buffers --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(numels=sizes, data=st.data(), micro_steps=st.integers(1, 4), chunks=layouts, seed=st.integers(0, 2**32))
def test_micro_steps_add_up(
    numels: list[int], data: st.DataObject, micro_steps: int, chunks: int, seed: int
) -> None:
    """A parameter may miss any of them; `add` tells when the last one of a bucket has come in the present one."""
    plan = plan_of(numels)
    staging = Staging(plan, layout_of(plan, chunks), chunks or 1, torch.float32, CPU)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        staging.start_window()
        sums: dict[int, Tensor] = {}
        for _ in range(micro_steps):
            staging.start_micro_step()
            factor = float(data.draw(st.sampled_from([1.0, 0.0, 0.5, 3.0])))
            came: set[int] = set()
            for index in data.draw(st.permutations(range(len(numels)))):
                if data.draw(st.booleans()):
                    gradient = torch.randn(numels[index], generator=generator)
                    # As the docstring of `add` says, in float32, in this order.
                    sums[index] = torch.add(sums[index], gradient, alpha=factor) if index in sums else gradient * factor
                    came.add(index)
                    bucket = staging.bucket_of(index)
                    assert staging.add(index, gradient, factor) == (set(plan.buckets[bucket].parameters) <= came)
            assert [staging.has_come(index) for index in range(len(numels))] == [
                index in came for index in range(len(numels))
            ]
        assert staging.contributed == [index in sums for index in range(len(numels))]
        for bucket in range(len(plan.buckets)):
            flat = staging.take(bucket)
            # A fused multiply-add may differ by one rounding from two steps.
            expected = expected_flat(plan, bucket, sums, chunks=chunks)
            torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-6)
            flat.fill_(float("nan"))  # it belongs to who took it: whoever still uses it is found out


def test_gradients_of_any_shape_layout_and_dtype() -> None:
    plan = plan_of([6])
    staging = Staging(plan, layout_of(plan, 0), 1, torch.float32, CPU)
    gradient = torch.randn(3, 2, dtype=torch.float64).T
    assert not gradient.is_contiguous()
    assert staging.add(0, gradient, 1.0)
    assert torch.equal(staging.take(0)[:6], gradient.reshape(-1).float())


def test_the_callers_gradient_is_not_changed_and_its_graph_not_kept() -> None:
    plan = plan_of([6])
    staging = Staging(plan, layout_of(plan, 0), 1, torch.float32, CPU)
    gradient = torch.randn(6, requires_grad=True) * 1.0
    before = gradient.detach().clone()
    assert staging.add(0, gradient, 3.0)
    assert not staging.add(0, gradient, 3.0), "two gradients of one parameter are no two parameters"
    taken = staging.take(0)
    assert not taken.requires_grad
    taken.zero_()
    assert torch.equal(gradient.detach(), before)


def test_what_stands_for_no_gradient_may_hold_anything() -> None:
    plan = plan_of([6])
    staging = Staging(plan, layout_of(plan, 0), 1, torch.float32, CPU)
    nothing, gradient = torch.full((6,), float("nan")), torch.randn(6)
    staging.add(0, nothing, 0.0)
    staging.add(0, gradient, 2.0)
    staging.add(0, nothing, 0.0)
    assert torch.equal(staging.take(0)[:6], 2.0 * gradient)


# --- from parameters to buckets that leave ------------------------------------------------------------------------


class Pipeline:
    """What `Gathering` asks of a micro-step and of the pipeline; notes what it is handed.

    Args:
        micro_steps: the micro-step that is the boundary.
    """

    def __init__(
        self, plan: BlockPlan, micro_steps: int, once_a_window: bool, exchange: Exchange | None = None
    ) -> None:
        self.plan, self.exchange, self.moo = plan, exchange or Exchange(), self
        self.window, self.micro_steps = Window(3, "language", once_a_window, apart=once_a_window), micro_steps
        self.left: list[tuple[int, int, Tensor]] = []

    def ingest(self, bucket: int, flat: Tensor, part: int) -> None:
        self.left.append((part, bucket, flat.clone()))
        flat.fill_(float("nan"))  # it belongs to the callee

    def begin(self, *slots: Slot) -> None:
        self.left.clear()
        if self.window.micro_steps == self.micro_steps:
            self.window.clear()
        self.window.add(slots)

    @property
    def boundary(self) -> bool:
        return self.window.micro_steps == self.micro_steps

    first = property(lambda self: self.window.micro_steps == 1)
    slot = property(lambda self: self.window.latest[self.exchange.rank])
    factor = property(lambda self: self.window.own_factor(self.exchange.rank) if self.window.once_a_window else 1.0)


def gathering_of(pipeline: Any, wire: torch.dtype = torch.float32, chunks: int = 0) -> Gathering:
    layout = layout_of(pipeline.plan, chunks)
    pipeline.exchange = pipeline.exchange if not chunks else SimpleNamespace(world_size=chunks, rank=0, **ALONE)
    return Gathering(pipeline, layout, wire, wire, CPU)


ALONE = {"gather_numbers": lambda numbers: [list(numbers)]}
ONE = Slot(1, 5, 5.0)


@settings(deadline=None)
@given(
    numels=sizes,
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunks=layouts,
    seed=st.integers(0, 2**32),
)
def test_each_micro_step_stands_alone(
    numels: list[int], data: st.DataObject, dtype: torch.dtype, chunks: int, seed: int
) -> None:
    """ZeRO-2 and ZeRO-3: any order, any missing, several in a row; what left early is what was complete, in the plan's
    order at first, then in the one that the first exchange has shown."""
    plan = plan_of(numels)
    count = len(plan.buckets)
    pipeline = Pipeline(plan, micro_steps=2, once_a_window=False)
    gathering = gathering_of(pipeline, dtype, chunks)
    generator = torch.Generator().manual_seed(seed)
    order, learned = list(range(count)), False
    for _ in range(3):
        pipeline.begin(*[ONE] * (chunks or 1))
        gathering.begin()
        came = data.draw(st.permutations(range(len(numels))))
        came = came[: data.draw(st.integers(0, len(came)))]
        values: dict[int, Tensor] = {}
        completed: list[int] = []
        for index in came:
            values[index] = torch.randn(1, numels[index], generator=generator).to(dtype)
            gathering.add(index, values[index])
            completed += [
                number
                for number, bucket in enumerate(plan.buckets)
                if set(bucket.parameters) <= set(values) and number not in completed
            ]
            ready = next((turn for turn, bucket in enumerate(order) if bucket not in completed), count)
            assert [bucket for _, bucket, _ in pipeline.left] == order[:ready]
        assert gathering.end() == [index in values for index in range(len(numels))]
        assert [bucket for _, bucket, _ in pipeline.left] == order
        for _, bucket, flat in pipeline.left:
            assert flat.dtype == dtype
            assert torch.equal(flat, expected_flat(plan, bucket, values, dtype, chunks))
        if completed and not learned:
            order, learned = completed + [bucket for bucket in order if bucket not in completed], True


def test_a_second_gradient_in_one_backward_is_added_while_its_bucket_waits() -> None:
    plan = plan_of([4, 4])
    pipeline = Pipeline(plan, micro_steps=1, once_a_window=False)
    gathering = gathering_of(pipeline)
    first, second, other = torch.randn(3, 4)
    pipeline.begin(ONE)
    gathering.begin()
    gathering.add(1, first)
    gathering.add(1, second)
    assert not pipeline.left
    gathering.add(0, other)
    ((_, _, flat),) = pipeline.left
    assert torch.equal(flat, torch.cat([other, first + second, torch.zeros(3)]))


@pytest.mark.parametrize("ended", [False, True])
def test_a_gradient_after_its_bucket_left_is_an_error(ended: bool) -> None:
    plan = plan_of([9, 9])
    pipeline = Pipeline(plan, micro_steps=1, once_a_window=False)
    gathering = gathering_of(pipeline)
    pipeline.begin(ONE)
    gathering.begin()
    if ended:
        gathering.end()
    else:
        gathering.add(1, torch.randn(9))  # the plan is the model's order reversed
    assert pipeline.left
    with pytest.raises(BucketMOOError) as caught:
        gathering.add(1, torch.randn(9))
    assert 'parameter "p1" got a second gradient in one backward' in str(caught.value)
    assert "use_reentrant=False" in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(
    languages=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**32),
)
def test_languages_are_added_up_apart(languages: list[list[int]], data: st.DataObject, seed: int) -> None:
    """ZeRO-1 on two ranks, two windows: at the boundary the k-th language of each rank leaves in part k, as zeros where
    a rank has fewer, in one order on both; before it nothing leaves."""
    plan, micro_steps = plan_of([5, 9, 4, 12]), len(languages)
    tokens = [[data.draw(st.sampled_from([0, 3, 8])) for _ in row] for row in languages]
    slots = [
        [Slot(language, count, float(count)) for language, count in zip(*row, strict=True)]
        for row in zip(languages, tokens, strict=True)
    ]
    used = [[[data.draw(st.booleans()) for _ in plan.parameters] for _ in row] for row in languages]
    generator = torch.Generator().manual_seed(seed)
    values = [[[torch.randn(each.numel, generator=generator) for each in plan.parameters] for _ in row] for row in used]

    def body(exchange: SimulatedExchange) -> list[Any]:
        pipeline, rank = Pipeline(plan, micro_steps, once_a_window=True, exchange=exchange), exchange.rank
        gathering, found = gathering_of(pipeline), []
        for _ in range(2):
            for step, row in enumerate(slots):
                pipeline.begin(*row)
                gathering.begin()
                for index, uses in enumerate(used[step][rank]):
                    if uses:
                        gathering.add(index, values[step][rank][index])
                contributed = gathering.end()
                assert pipeline.boundary or not pipeline.left
            found.append((contributed, list(pipeline.left), pipeline.window.parts))
        return found

    outcomes = run_ranks(2, body)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Exception):
            raise outcome
        for number, (contributed, left, parts) in enumerate(outcome):
            assert [each[:2] for each in left] == [each[:2] for each in outcomes[0][number][1]], "one order on all"
            assert contributed == [any(each[rank][index] for each in used) for index in range(len(plan.parameters))]
            assert sorted(each[:2] for each in left) == [
                (part, bucket) for part in range(parts) for bucket in range(len(plan.buckets))
            ]
            sums = sums_of(slots, used, values, rank)
            for part, bucket, flat in left:
                mine = list(sums.values())[part] if part < len(sums) else {}
                expected = expected_flat(plan, bucket, mine)
                expected = torch.nn.functional.pad(expected, (0, len(flat) - len(expected)))  # for the other rank
                # A fused multiply-add may differ by one rounding from two steps, and factors are below 3.
                torch.testing.assert_close(flat, expected, rtol=1e-6, atol=2e-6)


def sums_of(slots: Any, used: Any, values: Any, rank: int) -> dict[int, dict[int, Tensor]]:
    """Of each language that a rank fed, in the order in which they came: its sums in units of its first slot."""
    sums: dict[int, dict[int, Tensor]] = {}
    scales: dict[int, float] = {}
    for step, row in enumerate(slots):
        slot = row[rank]
        if not slot.target_tokens:
            continue
        factor = slot.scale / scales.setdefault(slot.language, slot.scale)
        of_language = sums.setdefault(slot.language, {})
        for index, uses in enumerate(used[step][rank]):
            if uses:
                before = of_language.get(index, torch.zeros(()))
                of_language[index] = before + factor * values[step][rank][index]
    return sums
