"""One rank of the overlap benchmark: what ran at the same time in a window, from torch.profiler.

The parts of bucket_moo that the main thread runs are labelled, so that everything else in a backward is the backward's
own work: autograd, and the wrapper's gathering of parameters. An exchange's time is gloo's own record of it, from when
gloo begins until the last byte is there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import step_worker
import torch
from step_worker import Arm, Settings
from torch.profiler import ProfilerActivity, profile, record_function

from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.pipeline.engine import BucketMOO

BACKWARD, START, WAIT, END = "moo: backward", "moo: start", "moo: wait", "moo: end"

# What resolves, by label.
RESOLVING = {
    "gram": [(ops, "gram"), (ops, "accumulate_gram")],
    "all-reduce of Grams": [(Exchange, "all_gather_grams"), (Exchange, "all_to_all_grams")],
    "solve": [(aggregate, "solve")],
    "combine": [(ops, "combine")],
    "control": [(Exchange, "_gather")],
}

Spans = list[tuple[float, float]]


def measure(rank: int, port: int, settings: Settings, arm: Arm, out: Path) -> None:
    """Profiles `settings.steps` windows; rank 0 writes what `describe` made of each, of all ranks, to `out`."""
    step_worker.join(rank, port, settings)
    _label(torch.Tensor, "backward", BACKWARD)
    _label(Exchange, "scatter", START)
    _label(Received, "wait", WAIT)
    _label(BucketMOO, "end_micro_step", END)
    for label, places in RESOLVING.items():
        for owner, name in places:
            _label(owner, name, label)
    run = settings.run(arm, rank)
    run.window()
    found = []
    for _ in range(settings.steps):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run.window()
        found.append(describe(profiler.events()))
    everyone = step_worker.gather(found)
    if rank == 0:
        windows = [window for of_rank in everyone for window in of_rank]
        out.write_text(json.dumps({"facts": run.facts(), "windows": windows}))


def describe(events: Iterable[Any]) -> dict[str, Any]:
    """Returns what a window was made of, in milliseconds.

    * `backward`: all backwards of the window.
    * `exchange`: in how many calls rows were exchanged, and how long any of that was under way (`ms`): while backward
      did its own work, while something was resolved, and while the main thread waited for rows.
    * `tail`: from the end of the last backward's own work until it returned, and its parts: calls and time.
    """
    spans: dict[str, Spans] = {label: [] for label in (BACKWARD, START, WAIT, END, *RESOLVING)}
    carried: Spans = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.name in spans:
            spans[event.name].append(span)
        elif event.name == "gloo:all_to_all":
            carried.append(span)
    # Grams travel by all-to-all too. Gloo begins in the order of the calls.
    calls = sorted([(*span, True) for span in spans[START]] + [(*span, False) for span in spans["all-reduce of Grams"]])
    rows = [span for span, (_, _, of_rows) in zip(sorted(carried), calls, strict=True) if of_rows]
    resolving = union(span for label in RESOLVING for span in spans[label])
    waiting = union(spans[WAIT])
    under_way, backward = union(rows), union(spans[BACKWARD])
    busy = union(resolving + waiting)
    inside = intersection(under_way, backward)
    last = (max(begin for begin, _ in spans[END]), backward[-1][1])
    parts = {label: _inside(spans[label], last) for label in (WAIT, *RESOLVING)}
    return {
        "backward": _milliseconds(backward),
        "exchange": {
            "calls": len(rows),
            "ms": _milliseconds(under_way),
            "during backward": _milliseconds(inside) - _milliseconds(intersection(inside, busy)),
            "during resolving": _milliseconds(intersection(inside, resolving)),
            "during waiting": _milliseconds(intersection(inside, waiting)),
        },
        "tail": {
            "ms": _milliseconds([last]),
            "parts": {label: {"calls": len(part), "ms": _milliseconds(union(part))} for label, part in parts.items()},
        },
    }


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Returns the same time as spans that ascend and do not overlap."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(ours: Spans, theirs: Spans) -> Spans:
    """Returns the time that lies in both; each must be a `union`."""
    both = [(max(a, c), min(b, d)) for a, b in ours for c, d in theirs]
    return [span for span in both if span[0] < span[1]]


def _inside(spans: Spans, within: tuple[float, float]) -> Spans:
    return [span for span in spans if within[0] <= span[0] and span[1] <= within[1]]


def _milliseconds(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans) / 1e3


def _label(owner: Any, name: str, label: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return original(*args, **kwargs)

    setattr(owner, name, labelled)
