"""Staging: buckets leave in the plan's order, each once, with every gradient in its place, however they come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds.adapters.staging import Staging
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.plan.blocks import BlockPlan, Parameter, plan_blocks
from bucketmoo_ds.plan.layout import Chunked, Consecutive

Left = list[tuple[int, Tensor]]


def make(plan: BlockPlan, dtype: torch.dtype = torch.float32, chunks: int = 0) -> tuple[Staging, Left]:
    """Staging of parameters in a row, or, as ZeRO-3 lays them out, each cut into so many chunks."""
    left: Left = []

    def release(bucket: int, flat: Tensor) -> None:
        left.append((bucket, flat.clone()))
        flat.fill_(float("nan"))  # it belongs to the callee: whoever still uses it is found out

    layout = (
        Chunked(plan, chunks, [-(-each.numel // chunks) for each in plan.parameters])
        if chunks
        else Consecutive(plan, [bucket.numel + 3 for bucket in plan.buckets])
    )
    return Staging(plan, layout, chunks or 1, dtype, torch.device("cpu"), release), left


def expected_flat(
    plan: BlockPlan, bucket: int, values: dict[int, Tensor], dtype: torch.dtype, chunks: int = 0
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
    """ZeRO-2 and ZeRO-3: any order, any missing, twice in a row; what left early is what was complete."""
    plan = plan_of(numels)
    staging, left = make(plan, dtype, chunks)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        staging.start_window()
        left.clear()
        order = data.draw(st.permutations(range(len(numels))))
        order = order[: data.draw(st.integers(0, len(order)))]
        values: dict[int, Tensor] = {}
        for index in order:
            values[index] = torch.randn(1, numels[index], generator=generator).to(dtype)
            staging.add(index, values[index], 1.0)
            staging.release_complete()
            complete = [set(bucket.parameters) <= set(values) for bucket in plan.buckets]
            ready = complete.index(False) if False in complete else len(complete)
            assert [bucket for bucket, _ in left] == list(range(ready))
        assert staging.contributed == [index in values for index in range(len(numels))]
        staging.release_all()
        assert [bucket for bucket, _ in left] == list(range(len(plan.buckets)))
        for bucket, flat in left:
            assert flat.dtype == dtype
            assert torch.equal(flat, expected_flat(plan, bucket, values, dtype, chunks))
        staging.release_all()
        assert len(left) == len(plan.buckets), "a second call lets nothing go"


@settings(deadline=None)
@given(numels=sizes, data=st.data(), micro_steps=st.integers(1, 4), chunks=layouts, seed=st.integers(0, 2**32))
def test_micro_steps_add_up(
    numels: list[int], data: st.DataObject, micro_steps: int, chunks: int, seed: int
) -> None:
    """ZeRO-1: one release a window, of the sums; a parameter may miss any of the micro-steps."""
    plan = plan_of(numels)
    staging, left = make(plan, chunks=chunks)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        staging.start_window()
        left.clear()
        sums: dict[int, Tensor] = {}
        for step in range(micro_steps):
            staging.start_micro_step()
            factor = float(data.draw(st.sampled_from([1.0, 0.0, 0.5, 3.0])))
            for index in data.draw(st.permutations(range(len(numels)))):
                if data.draw(st.booleans()):
                    gradient = torch.randn(numels[index], generator=generator)
                    # As the docstring of `add` says, in float32, in this order.
                    sums[index] = torch.add(sums[index], gradient, alpha=factor) if index in sums else gradient * factor
                    staging.add(index, gradient, factor)
                if step == micro_steps - 1:
                    staging.release_complete()
            assert (step == micro_steps - 1) or not left
        assert staging.contributed == [index in sums for index in range(len(numels))]
        staging.release_all()
        assert [bucket for bucket, _ in left] == list(range(len(plan.buckets)))
        for bucket, flat in left:
            # A fused multiply-add may differ by one rounding from two steps.
            expected = expected_flat(plan, bucket, sums, torch.float32, chunks)
            torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-6)


def test_a_second_gradient_in_one_backward_is_added_while_its_bucket_waits() -> None:
    plan = plan_of([4, 4])
    staging, left = make(plan)
    first, second, other = torch.randn(3, 4)
    staging.add(1, first, 1.0)
    staging.add(1, second, 1.0)
    staging.release_complete()
    assert not left, "two gradients of one parameter are no two parameters"
    staging.add(0, other, 1.0)
    staging.release_complete()
    assert torch.equal(left[0][1], torch.cat([other, first + second, torch.zeros(3)]))


@pytest.mark.parametrize("leave", [Staging.release_complete, Staging.release_all])
def test_a_gradient_after_its_bucket_left_is_an_error(leave: Callable[[Staging], None]) -> None:
    plan = plan_of([9, 9])
    staging, left = make(plan)
    staging.add(1, torch.randn(9), 1.0)
    leave(staging)
    assert left
    with pytest.raises(BucketMOOError) as caught:
        staging.add(1, torch.randn(9), 1.0)
    assert 'parameter "p1" got a second gradient in one backward' in str(caught.value)
    assert "use_reentrant=False" in str(caught.value)


def test_gradients_of_any_shape_layout_and_dtype() -> None:
    plan = plan_of([6])
    staging, left = make(plan)
    gradient = torch.randn(3, 2, dtype=torch.float64).T
    assert not gradient.is_contiguous()
    staging.add(0, gradient, 1.0)
    staging.release_all()
    assert torch.equal(left[0][1][:6], gradient.reshape(-1).float())


def test_the_callers_gradient_is_not_changed() -> None:
    plan = plan_of([6])
    staging, _ = make(plan)
    gradient = torch.randn(6)
    before = gradient.clone()
    staging.add(0, gradient, 3.0)
    staging.add(0, gradient, 3.0)
    staging.release_all()
    assert torch.equal(gradient, before)
