"""Renders a result of the overlap benchmark as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.markdown import table


def render(result: dict[str, Any]) -> str:
    """Returns the two tables, with where they come from and how to read them."""
    settings, facts = result["sets"][0]["settings"], result["sets"][0]["arms"][0]["facts"]
    arms = [(entry["settings"], arm) for entry in result["sets"] for arm in entry["arms"]]
    waiting, *resolving = arms[0][1]["windows"][0]["tail"]["parts"]
    place = ("wrapper", "W", "arm")
    during = ("backward's own work", "resolving", "waiting")
    lines = [
        f"{facts['parameters'] / 1e6:.1f} M parameters in {facts['buckets']} buckets, {settings['threads']} thread a "
        f"process, gloo; medians of {settings['steps']} windows of each rank, under the profiler.",
        "",
        f"{provenance.headline(result)}; `{result['command']}`",
        "",
        "Exchange of rows: how long any of it was under way in a window, and what the main thread did in that time.",
        "",
        *table(
            (*place, "all backwards, ms", "exchanges", "ms", *during),
            (_exchange_row(*each) for each in arms),
        ),
        "",
        "Tail: from the end of the last backward's own work until it returned. Calls and milliseconds of its parts; "
        "control is what ranks compare with each other, the rest is writing gradients and bookkeeping.",
        "",
        *table(
            (*place, "tail, ms", "of all backwards", "waiting", *resolving, "rest, ms"),
            (_tail_row(*each, [waiting, *resolving]) for each in arms),
        ),
    ]
    return "\n".join(lines)


def _exchange_row(settings: dict[str, Any], arm: dict[str, Any]) -> tuple[str, ...]:
    def share(of: str) -> str:
        return f"{sum(window['exchange'][of] for window in arm['windows']) / total:.0%}"

    total = sum(window["exchange"]["ms"] for window in arm["windows"])
    return (
        *_place(settings, arm),
        f"{statistics.median(window['backward'] for window in arm['windows']):.0f}",
        _calls(window["exchange"]["calls"] for window in arm["windows"]),
        f"{statistics.median(window['exchange']['ms'] for window in arm['windows']):.0f}",
        *(share(f"during {what}") for what in ("backward", "resolving", "waiting")),
    )


def _tail_row(settings: dict[str, Any], arm: dict[str, Any], parts: list[str]) -> tuple[str, ...]:
    tails = [window["tail"] for window in arm["windows"]]
    shares = [window["tail"]["ms"] / window["backward"] for window in arm["windows"]]
    rest = [tail["ms"] - sum(part["ms"] for part in tail["parts"].values()) for tail in tails]
    return (
        *_place(settings, arm),
        f"{statistics.median(tail['ms'] for tail in tails):.1f}",
        f"{statistics.median(shares):.0%}",
        *(
            f"{_calls(tail['parts'][part]['calls'] for tail in tails)}: "
            f"{statistics.median(tail['parts'][part]['ms'] for tail in tails):.1f}"
            for part in parts
        ),
        f"{statistics.median(rest):.1f}",
    )


def _place(settings: dict[str, Any], arm: dict[str, Any]) -> tuple[str, ...]:
    return settings["wrapper"], str(settings["world_size"]), arm["arm"]["name"]


def _calls(counts: Iterable[int]) -> str:
    """The same in every window and on every rank, or all that occurred."""
    return " or ".join(map(str, sorted(set(counts))))
