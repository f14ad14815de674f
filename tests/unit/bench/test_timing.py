"""Turns, percentiles and ratios, with calls whose cost is known."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from bucketmoo_ds.apps.bench import bandwidth, device, timing
from bucketmoo_ds.apps.bench.timing import Stopwatch, Times, take_turns

CPU = torch.device("cpu")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 10)
    monkeypatch.setattr(timing, "MEBI", 1 << 8)
    return Stopwatch(CPU)


def test_percentiles_are_numpys() -> None:
    for length in (1, 2, 3, 20):
        values = tuple(random.random() for _ in range(length))
        found = Times(values)
        expected = np.percentile(values, [20, 50, 80])
        assert np.allclose([found.spread[0], found.median, found.spread[1]], expected, rtol=1e-12), values


def test_ratios_are_taken_within_turns() -> None:
    """The machine slows down tenfold half-way: the ratio of medians would be 2 or 20, not 4."""
    ours, theirs = Times((1.0, 1.0, 10.0)), Times((4.0, 4.0, 40.0))
    assert theirs.ratio_to(ours) == 4.0
    assert Times((8.0,)).ratio_to(ours) == 8.0, "a slow peer has fewer turns"


def test_calls_take_turns(watch: Stopwatch) -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    times = take_turns(calls, watch, repeats=4, seconds=10.0)
    assert "".join(order) == "abc" + 4 * "abc"
    assert {len(found.milliseconds) for found in times.values()} == {4}


def test_warm_calls_run_twice_and_are_timed_once(watch: Stopwatch) -> None:
    ran = []
    times = take_turns({"a": lambda: ran.append(1)}, watch, repeats=3, seconds=10.0, warm=["a"])
    assert len(ran) == 1 + 2 * 3
    assert len(times["a"].milliseconds) == 3


def test_slow_calls_have_fewer_turns_but_three(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"slow": lambda: time.sleep(0.2), "fast": lambda: None}
    times = take_turns(calls, watch, repeats=10, seconds=0.4)
    assert len(times["slow"].milliseconds) == 3
    assert len(times["fast"].milliseconds) == 10
    assert times["slow"].median >= 200.0, "milliseconds"
    monkeypatch.setattr(timing, "SLOW", 0.1)
    assert len(take_turns(calls, watch, repeats=10, seconds=0.1)["slow"].milliseconds) == 1


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "free_bytes", lambda device: 1 << 20)
    copy = bandwidth.Copy(CPU)
    assert copy.moved_bytes == 2 * (1 << 16), "a sixteenth of the memory that is free"
    copy()
    assert torch.equal(copy._source, copy._target)


def test_the_machine_has_a_cache_and_memory() -> None:
    assert 1 << 15 <= device.cache_bytes(CPU) <= 1 << 33
    assert 1 << 20 <= device.free_bytes(CPU) <= 1 << 46


def test_memory_ends_at_the_containers_limit(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "limit").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(device, "_LIMITS", (tmp_path / "none", tmp_path / "limit", tmp_path / "absent"))
    assert device.free_bytes(CPU) == 123456
    (tmp_path / "limit").write_text("max\n")
    assert device.free_bytes(CPU) > 123456


def test_cache_sizes_are_read_in_their_units(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(device, "_CACHES", tmp_path)
    assert device.cache_bytes(CPU) == device.UNKNOWN_CACHE
    for index, size in enumerate(("32K", "64M", "512K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert device.cache_bytes(CPU) == 64 << 20
