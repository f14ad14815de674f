"""The cases of a sweep: what they must move, and which are planned."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from bucketmoo_ds.apps.bench import cases
from bucketmoo_ds.apps.bench.cases import DTYPES, OPS, WHOLE, Case, plan
from bucketmoo_ds.errors import ConfigError

CPU = torch.device("cpu")


def test_floor_counts_each_operand_once() -> None:
    count, elements = random.randint(1, 64), random.randint(1, 10**7)
    for name, dtype in DTYPES.items():
        moved = {op: Case(op, name, count, elements, WHOLE, 1).floor_bytes(cache=0) for op in OPS}
        e = dtype.itemsize
        assert moved == {
            "gram": count * elements * e,
            "combine": (count + 1) * elements * e,
            "accumulate_gram": count * elements * (4 + e + 4),
            "min_norm": None,
            "resolve": 2 * count * elements * e + elements * e,
        }, (count, elements)


def test_resolve_in_cache_reads_its_rows_once() -> None:
    case = Case("resolve", "bf16", 8, 1000, WHOLE, 1)
    assert case.floor_bytes(cache=16_000) == 18_000
    assert case.floor_bytes(cache=15_999) == 34_000


def test_segments_are_whole_and_their_blocks_are_few() -> None:
    few: dict[str, Any] = {"ops": ("gram",), "dtypes": ("fp32",), "languages": (3,), "segments": (300,)}
    (case,) = plan(full=True, device=CPU, elements=(10_000,), **few)
    assert (case.elements, case.segments, case.num_blocks) == (9_900, 33, 16)
    (case,) = plan(full=True, device=CPU, elements=(1_000,), **few)
    assert (case.elements, case.segments, case.num_blocks) == (900, 3, 3)


def test_short_plan_is_much_smaller_and_has_every_op_dtype_and_segment() -> None:
    short, full = plan(full=False, device=CPU), plan(full=True, device=CPU)
    assert 3 * len(short) < len(full)
    assert {case.op for case in short} == set(OPS)
    assert {case.dtype for case in short} == {"fp32", "bf16", "fp64"}
    assert {case.segment for case in short} == {WHOLE, 4096}
    assert Case("min_norm", "fp64", 16, 0, WHOLE, 64) in short
    assert Case("min_norm", "fp64", 16, 0, WHOLE, 512) in full
    assert {case.languages for case in short if case.op == "accumulate_gram" or case.segment} == {8}
    given = plan(full=False, device=CPU, languages=(2, 3), segments=(WHOLE, 4096))
    assert len([case for case in given if case.op != "min_norm"]) == 4 * 2 * 2 * 2, "what is asked for is not cut down"
    assert {case.languages for case in full} == {2, 4, 8, 16, 32, 64}
    assert len(set(full)) == len(full)


def test_shards_of_many_languages_are_shorter_in_a_short_run_unless_they_are_given() -> None:
    shards = {case.languages: case.elements for case in plan(full=False, device=CPU, ops=("gram",), segments=(WHOLE,))}
    assert shards == {2: 10_000_000, 8: 10_000_000, 32: 1_250_000}
    one: dict[str, Any] = {"ops": ("gram",), "dtypes": ("fp32",), "languages": (32,), "segments": (WHOLE,)}
    (given,) = plan(full=False, device=CPU, elements=(10**7,), **one)
    assert given.elements == 10**7


def test_min_norm_depends_neither_on_the_dtype_nor_on_the_segments() -> None:
    planned = plan(full=True, device=CPU, ops=("min_norm",))
    assert {(case.dtype, case.elements, case.segments) for case in planned} == {("fp64", 0, 0)}


def test_gpu_plan_has_a_shard_that_stays_in_cache() -> None:
    device = torch.device("cuda")
    hopper = 50 << 20
    resolved = [case for case in plan(full=False, device=device) if case.op == "resolve"]
    assert any(case.fits_cache(hopper) for case in resolved)
    assert any(not case.fits_cache(hopper) for case in resolved)


def test_a_segment_longer_than_a_shard_is_refused() -> None:
    with pytest.raises(ConfigError, match="--segment 4096: longer than a shard of 1000"):
        plan(full=False, device=CPU, elements=(5000, 1000), segments=(cases.WHOLE, 4096))
    assert all(case.segment == WHOLE for case in plan(full=False, device=CPU, elements=(1000,)))
    with pytest.raises(ConfigError, match="--segment 1000000: longer than a shard of 312500"):
        plan(full=False, device=CPU, languages=(64,), segments=(1_000_000,))
