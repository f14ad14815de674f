"""Measures the kernels: every case on every backend, its peers and a copy, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bucketmoo_ds.apps.bench import peers
from bucketmoo_ds.apps.bench.bandwidth import Copy
from bucketmoo_ds.apps.bench.cases import Case
from bucketmoo_ds.apps.bench.device import MEBI, cache_bytes, free_bytes
from bucketmoo_ds.apps.bench.inputs import Inputs, Store
from bucketmoo_ds.apps.bench.timing import Call, Stopwatch, Times, take_turns

LEAST_WORK = 256 * MEBI  # as which a smaller case counts when time is shared
SHARE_OF_MEMORY = 0.8  # that a case may take of what is free: other programs want some as well


@dataclasses.dataclass(frozen=True)
class Line:
    """One op on one shape by one backend. What does not apply is `None`.

    Attributes:
        op, backend, dtype: names; the dtype is that of the rows, of the incoming gradients of `accumulate_gram`, whose
            rows are fp32, and of the Gram of `min_norm`.
        K, S, segments, B: languages, elements of the shard, segments of it, blocks.
        cache: `flushed` where the call found its rows in memory, `warm` where they may have been in cache.
        repeats: how often it was timed.
        p20_ms, p50_ms, p80_ms: percentiles of its time.
        floor_bytes: what it must move, see `Case.floor_bytes`.
        gb_per_s: these bytes by the median time, 1e9 bytes a second.
        copy_gb_per_s: what a large copy reached in between.
        share_of_copy: the first by the second, median over the turns.
        times_floor: 1 / share_of_copy: how many times longer than a copy of that many bytes.
        torch_ms, compile_ms, torchjd_ms, separate_ms: median times of the peers; separate is gram, min_norm and combine
            of the same backend one after the other, where resolve may hold the rows in cache.
        vs_torch, vs_compile, vs_torchjd, vs_separate: their time by ours, median over the turns: 2 is twice as fast.
    """

    op: str
    backend: str
    dtype: str
    K: int
    S: int
    segments: int
    B: int
    cache: str
    repeats: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    floor_bytes: int | None
    gb_per_s: float | None
    copy_gb_per_s: float
    share_of_copy: float | None
    times_floor: float | None
    torch_ms: float | None
    vs_torch: float | None
    compile_ms: float | None
    vs_compile: float | None
    torchjd_ms: float | None
    vs_torchjd: float | None
    separate_ms: float | None
    vs_separate: float | None


@dataclasses.dataclass(frozen=True)
class Found:
    """What a sweep found.

    Attributes:
        lines: in the order of the cases, then of the backends.
        skipped: one sentence for each case that did not fit into memory, or into the time.
        seconds: how long it took.
    """

    lines: list[Line]
    skipped: list[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain JSON values."""
        return dataclasses.asdict(self)


def sweep(
    cases: Sequence[Case],
    backends: Sequence[str],
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    compiled: bool,
    say: Callable[[str], None],
) -> Found:
    """Measures the cases.

    Args:
        cases: what is measured; see `cases.plan`.
        backends: names of backends that can run on the device.
        device: where.
        repeats: the most turns of a case.
        seconds: how long all of it may take. What is left is shared by the cases that are left, in proportion to the
            memory they take; afterwards none begins.
        compiled: whether torch.compile is a peer on CUDA; it takes seconds for each case.
        say: is told what is being measured, and what is skipped.
    """
    began = time.monotonic()
    watch, copy, store = Stopwatch(device), Copy(device), Store(device)
    lines: list[Line] = []
    skipped = []
    work = [max(case.needed_bytes(), LEAST_WORK) for case in cases]
    for index, case in enumerate(cases):
        left = seconds - (time.monotonic() - began)
        reason = _make_room(case, store, device) if left > 0 else f"{seconds:g} seconds are over; --seconds gives more"
        if reason:
            skipped.append(f"{case}: {reason}")
            say(f"skipped {skipped[-1]}")
            continue
        say(f"{index + 1}/{len(cases)} {case}")
        inputs = store.inputs(case)
        others = peers.peers(inputs, compiled=compiled)
        share = left * work[index] / sum(work[index:])
        lines += _measure(inputs, backends, others, watch, copy, repeats=repeats, seconds=share)
    return Found(lines, skipped, round(time.monotonic() - began, 1))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it, torch and the kernels use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(
    inputs: Inputs,
    backends: Sequence[str],
    others: Mapping[str, Call],
    watch: Stopwatch,
    copy: Copy,
    *,
    repeats: int,
    seconds: float,
) -> list[Line]:
    case, cache = inputs.case, cache_bytes(watch.device)
    resident = case.op == "resolve" and case.fits_cache(cache)
    calls: dict[str, Call] = {"copy": copy} | {backend: inputs.call(backend) for backend in backends}
    if resident:
        calls |= {f"separate {backend}": inputs.separate_call(backend) for backend in backends}
    calls |= others
    # A resident resolve is measured as it runs in a step: the exchange has just written the rows.
    warm = [name for name in calls if name != "copy"] if resident else []
    times = take_turns(calls, watch, repeats=repeats, seconds=seconds, warm=warm)
    lines = []
    for backend in backends:
        theirs = {name: times.get(name) for name in ("torch", "compile", "torchjd")}
        theirs["separate"] = times.get(f"separate {backend}")
        floor = case.floor_bytes(cache)
        lines.append(
            Line(
                op=case.op,
                backend=backend,
                dtype=case.dtype,
                K=case.languages,
                S=case.elements,
                segments=case.segments,
                B=case.num_blocks,
                cache="warm" if resident else "flushed",
                **_own_columns(times[backend], floor, times["copy"], copy.moved_bytes),
                **_peer_columns(times[backend], theirs),
            )
        )
    return lines


def _own_columns(ours: Times, floor: int | None, copied: Times, copied_bytes: int) -> dict[str, Any]:
    low, high = ours.spread
    share = None if floor is None else copied.ratio_to(ours) * floor / copied_bytes
    return {
        "repeats": len(ours.milliseconds),
        "p20_ms": _rounded(low),
        "p50_ms": _rounded(ours.median),
        "p80_ms": _rounded(high),
        "floor_bytes": floor,
        "gb_per_s": None if floor is None else _rounded(floor / ours.median / 1e6),
        "copy_gb_per_s": _rounded(copied_bytes / copied.median / 1e6),
        "share_of_copy": None if share is None else _rounded(share),
        "times_floor": None if share is None else _rounded(1.0 / share),
    }


def _peer_columns(ours: Times, others: Mapping[str, Times | None]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, theirs in others.items():
        columns[f"{name}_ms"] = None if theirs is None else _rounded(theirs.median)
        columns[f"vs_{name}"] = None if theirs is None else _rounded(theirs.ratio_to(ours))
    return columns


def _make_room(case: Case, store: Store, device: torch.device) -> str:
    """Returns why a case does not fit into memory; "" if it does."""
    needed = case.needed_bytes()
    if needed <= SHARE_OF_MEMORY * free_bytes(device):
        return ""
    store.release()
    free = free_bytes(device)
    if needed <= SHARE_OF_MEMORY * free:
        return ""
    return f"takes {needed / MEBI:.0f} MiB, and {free / MEBI:.0f} MiB of memory are free"


def _rounded(value: float) -> float:
    """Four digits: a time says no more than three."""
    return float(f"{value:.4g}")
