"""Renders a result of `mixed_study.py` as Markdown."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Sequence
from typing import Any

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.markdown import table

CUT = (
    "Cut for two shared cores: a model, sequences, a vocabulary and steps smaller than the quickstart's; one learning "
    "rate for all, tuned for none; one process."
)


def render(result: dict[str, Any]) -> str:
    """Returns the table with where it comes from."""
    settings, corpus = result["settings"], result["corpus"]
    lines = [
        f"{provenance.headline(result)}; `{result['command']}`",
        "",
        f"{corpus['source']} {corpus['version']}; {len(settings['seen'])} languages, {settings['steps']} windows of "
        f"{settings['sequences']} sequences of {settings['sequence_length']} tokens a language, {settings['layers']} "
        f"layers of width {settings['hidden']}, granularity `{settings['granularity']}`; base model "
        f"{result['base']:.3f}. {CUT}",
        "",
        "R is `gram_every`. Held-out bits per byte, mean of the languages, lower is better; the paired difference with "
        "its bootstrap interval of 95 % over the seeds; the largest weight of a language in any window and block, and "
        "the share of windows and blocks where one was above 1 (averaging gives 1/8 to each).",
        "",
        *_table(result["values"], result["values"]["averaging"]),
    ]
    if "before" in result:
        lines += [
            "",
            "The same before two changes of the estimate. Kept Grams were averaged at the size that they had, so that "
            "the first ones, the largest, decided the weights to the end; and rules saw rows without their noise, and "
            "made short ones long:",
            "",
            *_table(result["before"], result["values"]["averaging"]),
        ]
    if "fresh" in result:
        fresh = result["fresh"]
        lines += [
            "",
            f"Fresh seeds ({', '.join(fresh['averaging'])}), which no choice has seen, with the code as it is:",
            "",
            *_table(fresh, fresh["averaging"]),
        ]
    if "larger" in result:
        larger = result["larger"]
        plain = larger["values"]["averaging"]
        changes = ", ".join(
            f"{name} {value - plain:+.3f}" for name, value in larger["values"].items() if value != plain
        )
        described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in larger["settings"].items())
        lines += [
            "",
            f"A larger run ({described}), given up for lack of time after part of seed {larger['seed']}: {changes}.",
        ]
    lines += ["", *(f"* {note}" for note in result.get("notes", ()))]
    return "\n".join(lines)


def _table(values: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    rows = []
    for name in sorted(values, key=_place):
        runs = values[name]
        seeds = [seed for seed in runs if seed in plain]
        differences = [runs[seed]["bits_per_byte"] - plain[seed]["bits_per_byte"] for seed in seeds]
        low, high = _interval(differences)
        rows.append(
            (
                name,
                f"{statistics.fmean(runs[seed]['bits_per_byte'] for seed in seeds):.3f}",
                "" if name == "averaging" else f"{statistics.fmean(differences):+.3f} ({low:+.3f} to {high:+.3f})",
                "" if name == "averaging" else f"{sum(each < 0 for each in differences)} of {len(seeds)}",
                "" if name == "averaging" else f"{max(run['largest_weight'] for run in runs.values()):.1f}",
                "" if name == "averaging" else f"{statistics.fmean(run['above_one'] for run in runs.values()):.0%}",
            )
        )
    head = ("arm", "bits per byte", "minus averaging, paired", "better in", "largest weight", "above 1")
    return table(head, rows)


def _place(name: str) -> tuple[Any, ...]:
    """Arms in the order of their modes, then rules, then numbers."""
    mode, rule, *_ = *re.findall(r"\w+", name), ""
    return mode, rule, [int(number) for number in re.findall(r"\d+", name)]


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    """Where 95 of 100 means lie of as many differences drawn from these with replacement; the same each time."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(2000))
    return means[50], means[1949]
