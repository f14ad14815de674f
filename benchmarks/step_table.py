"""Renders a result of a step benchmark as Markdown."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.markdown import table

MEBI = 2**20

# Of `traffic.Call.purpose`: what a column of bytes is for.
PURPOSES = ("rows", "combined", "grams", "control", "parameters")


def render(result: dict[str, Any]) -> str:
    """Returns the tables of time and memory, and of bytes, with where they come from and how to read them."""
    settings = result["sets"][0]["settings"]
    lines = [f"ZeRO-{settings['stage']} over gloo on one machine, {described(result)}", ""]
    lines += [f"{provenance.headline(result)}; `{result['command']}`", ""]
    gradients = "DeepSpeed's all-reduce, or the rows and combined pieces of bucket_moo"
    lines += tables(result, PLACE, plain="plain DeepSpeed", gradients=gradients)
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Returns one short table: what MGDA costs over plain DeepSpeed of the same accumulation, in float32."""
    head = ("W", "arm (K languages, M micro-steps)", *RATIOS)
    return "\n".join([f"{provenance.headline(result)}.", "", *table(head, ratios(result, ("world_size",)))])


# Of a process set's settings: what tells a table's rows apart, by the heading of its column.
PLACE = {"W": "world_size", "dtype": "dtype"}

RATIOS = ("step time, ratio", "peak memory, ratio", "gradient bytes, ratio")


def described(result: dict[str, Any]) -> str:
    """Returns what all sets have in common."""
    first = result["sets"][0]
    settings, arm = first["settings"], first["arms"][1]
    return (
        f"{arm['parameters'] / 1e6:.1f} M parameters in {arm['buckets']} buckets, {settings['tokens']} tokens a "
        f"micro-batch, {settings['threads']} thread a process, backend {arm['backend']}, {settings['steps']} timed "
        "windows an arm, language s mod K in slot s."
    )


def tables(result: dict[str, Any], place: Mapping[str, str], *, plain: str, gradients: str) -> list[str]:
    """Returns the two tables with how to read them.

    Args:
        place: see `PLACE`.
        plain: what ratios are to.
        gradients: which of the collectives count as gradients.
    """
    where = tuple(place.values())
    return [
        "### Time and memory",
        "",
        "Time of one optimizer step (M micro-steps), median with 20th to 80th percentile. All arms of a block took "
        f"turns in the same processes, window by window; the ratio is the median of the ratios to {plain} within a "
        "turn, with its bootstrap interval of 95 %. Memory is the resident peak of the largest rank while it trains, "
        "above what it had before the model was made, each arm in fresh processes (mean holds what mgda holds). Rows "
        "are what the row store of the window holds of it.",
        "",
        *table(
            (*place, "arm", "ms a step", "time, ratio", "peak MiB", "peak, ratio", "rows, MiB"),
            (_place(*pair, where) + _time_row(*pair) for pair in _pairs(result)),
        ),
        "",
        "### Bytes sent by a rank in one optimizer step",
        "",
        f"MiB of the rank that sent most, counted from what each collective carried. Gradients are {gradients}; the "
        "ratio compares those. Updated parameters are gathered alike in both. Sockets is what the kernel says all "
        "ranks' connections sent, over the sum of what was counted: gloo's headers are the difference.",
        "",
        *table(
            (*place, "arm", "gradients", "ratio", *PURPOSES, "sockets"),
            (_place(*pair, where) + _bytes_row(*pair) for pair in _pairs(result)),
        ),
    ]


def ratios(result: dict[str, Any], where: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Yields rows of what MGDA costs in float32: settings, arm, and the three `RATIOS`."""
    for pair in _pairs(result):
        settings, arm, _ = pair
        if settings["dtype"] == "fp32" and arm["arm"]["aggregator"] == "mgda":
            _, time, _, peak, _ = _time_row(*pair)
            yield (*_place(*pair, where), time, peak, _bytes_row(*pair)[1])


Entry = dict[str, Any]


def _pairs(result: dict[str, Any]) -> Iterable[tuple[Entry, Entry, Entry]]:
    """Every (settings, arm, plain arm that it is divided by: the last one that stands before it)."""
    for entry in result["sets"]:
        for arm in entry["arms"]:
            if arm["arm"]["aggregator"] is None:
                plain = arm
            yield entry["settings"], arm, plain


def _place(settings: Entry, arm: Entry, plain: Entry, where: Sequence[str]) -> tuple[str, ...]:
    return (*(str(settings[key]) for key in where), arm["arm"]["name"])


def _time_row(settings: Entry, arm: Entry, plain: Entry) -> tuple[str, ...]:
    milliseconds = [1e3 * seconds for seconds in arm["seconds"]]
    ratios = [ours / theirs for ours, theirs in zip(arm["seconds"], plain["seconds"], strict=True)]
    peak = max(arm["memory"]["peak_bytes"]) if "memory" in arm else None
    plain_peak = max(plain["memory"]["peak_bytes"])
    baseline = arm is plain
    return (
        spread(milliseconds, ".0f"),
        "1" if baseline else ratio(ratios),
        "" if peak is None else f"{peak / MEBI:.0f}",
        "" if peak is None else "1" if baseline else f"{peak / plain_peak:.2f}",
        "" if baseline else f"{max(rank['row_store'] for rank in arm['ranks']) / MEBI:.0f}",
    )


def _bytes_row(settings: Entry, arm: Entry, plain: Entry) -> tuple[str, ...]:
    def most(purpose: str) -> str:
        sent = max(rank["by_purpose"].get(purpose, 0) for rank in arm["ranks"])
        return f"{sent / MEBI:.2f}" if sent >= 0.01 * MEBI else f"{sent} B" if sent else ""

    gradients, plain_gradients = (max(rank["gradients"] for rank in each["ranks"]) for each in (arm, plain))
    counted = sum(sum(rank["by_purpose"].values()) for rank in arm["ranks"])
    return (
        f"{gradients / MEBI:.2f}",
        "1" if arm is plain else f"{gradients / plain_gradients:.3f}",
        *map(most, PURPOSES),
        f"{sum(rank['sockets'] for rank in arm['ranks']) / counted:.4f}",
    )


def spread(values: Sequence[float], form: str) -> str:
    """Returns the median with the 20th and the 80th percentile."""
    low, high = (_percentile(values, share) for share in (0.2, 0.8))
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def ratio(ratios: Sequence[float]) -> str:
    """Returns the median with its interval."""
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Returns where 95 of 100 medians lie of as many ratios drawn from these with replacement (the bootstrap), the same
    in each rendering."""
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000)]
    return _percentile(medians, 0.025), _percentile(medians, 0.975)


def _percentile(values: Sequence[float], share: float) -> float:
    """Interpolates between the closest ranks, as numpy does."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
