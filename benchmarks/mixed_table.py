"""Renders a result of the benchmark of mode `mixed` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import step_table

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.markdown import table

EVERY = 8  # windows from one Gram to the next, by default


def render(result: dict[str, Any]) -> str:
    """Returns the table with where it comes from and how to read it."""
    settings, arm = result["sets"][0]["settings"], result["sets"][0]["arms"][0]
    head = ("tokens", "W", "K", "plain, ms", "no Grams", "R = 1", f"R = {EVERY}", "peak", "gradients", "rest, bytes")
    return "\n".join(
        [
            f"{arm['parameters'] / 1e6:.1f} M parameters, float32, micro-batches of 16 sequences, a window of one "
            f"micro-step, CAGrad by layers, {settings['threads']} thread a process, {settings['steps']} timed windows "
            "an arm; W = 1 without a wrapper, W = 2 DDP over gloo.",
            "",
            f"{provenance.headline(result)}; `{result['command']}`",
            "",
            "Time of a window over plain training's, median of the ratios within a turn, with its bootstrap interval "
            f"of 95 %: of windows without Grams, of windows with (R = 1), and of {EVERY - 1} without and one with (R = "
            f"{EVERY}). Peak memory, of windows with Grams, and bytes of gradients are ratios to plain too; the rest "
            "is what a rank sends besides in a window with Grams, the Grams and what ranks tell each other.",
            "",
            *table(head, _rows(result)),
        ]
    )


def _rows(result: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for entry in result["sets"]:
        settings, (plain, *arms) = entry["settings"], entry["arms"]
        milliseconds = [1e3 * seconds for seconds in plain["seconds"]]
        for without, taking in zip(arms[::2], arms[1::2], strict=True):
            cheap, full = (
                [ours / theirs for ours, theirs in zip(arm["seconds"], plain["seconds"], strict=True)]
                for arm in (without, taking)
            )
            both = [((EVERY - 1) * one + other) / EVERY for one, other in zip(cheap, full, strict=True)]
            peak, plain_peak = (max(arm["memory"]["peak_bytes"]) for arm in (taking, plain))
            sent = max(taking["ranks"], key=lambda rank: sum(rank["by_purpose"].values()))["by_purpose"]
            gradients, plain_gradients = (max(rank["gradients"] for rank in arm["ranks"]) for arm in (taking, plain))
            yield (
                str(settings["tokens"]),
                str(settings["world_size"]),
                str(taking["arm"]["languages"]),
                step_table.spread(milliseconds, ".0f"),
                *map(step_table.ratio, (cheap, full, both)),
                f"{peak / plain_peak:.2f}",
                f"{gradients / plain_gradients:.3f}" if plain_gradients else "",
                f"{sum(sent.values()) - gradients:,}",
            )
