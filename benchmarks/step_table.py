"""Renders a result of the step benchmark as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bucketmoo_ds.bench import provenance

MEBI = 2**20

# Of `traffic.Call.purpose`: what a column of bytes is for.
PURPOSES = ("rows", "combined", "grams", "control", "parameters")


def render(result: dict[str, Any]) -> str:
    """Returns the tables of time and memory, and of bytes, with where they come from and how to read them."""
    first = result["sets"][0]
    settings, arm = first["settings"], first["arms"][1]
    parameters, languages = arm["parameters"], "language s mod K in slot s"
    lines = [
        f"ZeRO-{settings['stage']} over gloo on one machine, {parameters / 1e6:.1f} M parameters in {arm['buckets']} "
        f"buckets, {settings['tokens']} tokens a micro-batch, {settings['threads']} thread a process, backend "
        f"{arm['backend']}, {settings['steps']} timed windows an arm, {languages}.",
        "",
        f"{provenance.headline(result)}; `{result['command']}`",
        "",
        "### Time and memory",
        "",
        "Time of one optimizer step (M micro-steps), median with 20th to 80th percentile. All arms of a block took "
        "turns in the same processes; the ratio is the median of the ratios to plain DeepSpeed within a turn, with its "
        "20th to 80th percentile. Memory is the resident peak of the largest rank while it trains, above what it had "
        "before the model was made, each arm in fresh processes (mean holds what mgda holds). Rows are what the row "
        "store of the window holds of it.",
        "",
        *_table(
            ("W", "dtype", "arm", "ms a step", "time, ratio", "peak MiB", "peak, ratio", "rows, MiB"),
            (_time_row(entry, arm, plain) for entry, arm, plain in _pairs(result)),
        ),
        "",
        "### Bytes sent by a rank in one optimizer step",
        "",
        "MiB of the rank that sent most, counted from what each collective carried. Gradients are DeepSpeed's "
        "all-reduce, or the rows and combined pieces of bucket_moo; the ratio compares those. Updated parameters are "
        "gathered alike in both. Sockets is what the kernel says all ranks' connections sent, over the sum of what was "
        "counted: gloo's headers are the difference.",
        "",
        *_table(
            ("W", "dtype", "arm", "gradients", "ratio", *PURPOSES, "sockets"),
            (_bytes_row(entry, arm, plain) for entry, arm, plain in _pairs(result)),
        ),
    ]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Returns one short table: what MGDA costs over plain DeepSpeed of the same accumulation, in float32."""
    rows = []
    for settings, arm, plain in _pairs(result):
        if settings["dtype"] == "fp32" and arm["arm"]["aggregator"] == "mgda":
            world, _, name, _, time, _, peak, _ = _time_row(settings, arm, plain)
            rows.append((world, name, time, peak, _bytes_row(settings, arm, plain)[4]))
    head = ("W", "arm (K languages, M micro-steps)", "step time, ratio", "peak memory, ratio", "gradient bytes, ratio")
    return "\n".join([f"{provenance.headline(result)}.", "", *_table(head, rows)])


def _pairs(result: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Every (settings, arm, plain arm with as many micro-steps)."""
    for entry in result["sets"]:
        plain = {arm["arm"]["micro_steps"]: arm for arm in entry["arms"] if arm["arm"]["aggregator"] is None}
        for arm in entry["arms"]:
            yield entry["settings"], arm, plain[arm["arm"]["micro_steps"]]


def _time_row(settings: dict[str, Any], arm: dict[str, Any], plain: dict[str, Any]) -> tuple[str, ...]:
    milliseconds = [1e3 * seconds for seconds in arm["seconds"]]
    ratios = [ours / theirs for ours, theirs in zip(arm["seconds"], plain["seconds"], strict=True)]
    peak = max(arm["memory"]["peak_bytes"]) if "memory" in arm else None
    plain_peak = max(plain["memory"]["peak_bytes"])
    baseline = arm is plain
    return (
        str(settings["world_size"]),
        settings["dtype"],
        arm["arm"]["name"],
        _spread(milliseconds, ".0f"),
        "1" if baseline else _spread(ratios, ".2f"),
        "" if peak is None else f"{peak / MEBI:.0f}",
        "" if peak is None else "1" if baseline else f"{peak / plain_peak:.2f}",
        "" if baseline else f"{max(rank['row_store'] for rank in arm['ranks']) / MEBI:.0f}",
    )


def _bytes_row(settings: dict[str, Any], arm: dict[str, Any], plain: dict[str, Any]) -> tuple[str, ...]:
    def most(purpose: str) -> str:
        sent = max(rank["by_purpose"].get(purpose, 0) for rank in arm["ranks"])
        return f"{sent / MEBI:.2f}" if sent >= 0.01 * MEBI else f"{sent} B" if sent else ""

    gradients, plain_gradients = (max(rank["gradients"] for rank in each["ranks"]) for each in (arm, plain))
    counted = sum(sum(rank["by_purpose"].values()) for rank in arm["ranks"])
    return (
        str(settings["world_size"]),
        settings["dtype"],
        arm["arm"]["name"],
        f"{gradients / MEBI:.2f}",
        "1" if arm is plain else f"{gradients / plain_gradients:.3f}",
        *map(most, PURPOSES),
        f"{sum(rank['sockets'] for rank in arm['ranks']) / counted:.4f}",
    )


def _spread(values: Sequence[float], form: str) -> str:
    low, high = (_percentile(values, share) for share in (0.2, 0.8))
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def _percentile(values: Sequence[float], share: float) -> float:
    """Interpolates between the closest ranks, as numpy does."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
