"""Renders a simulation: for a terminal, and as Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.table

from bucketmoo_ds.apps import markdown
from bucketmoo_ds.apps.bench.provenance import headline

READ = (
    "Distance from the Pareto front in the space of losses at the end, of the worst start; in brackets the norm of the "
    "min-norm point of the whole gradients, the largest of all starts: 0 is Pareto stationary. Below 0.01 stands 0."
)
SMALL = 1e-2  # of runs that end after so many steps


def to_markdown(result: Mapping[str, Any]) -> str:
    """Returns the table with where it comes from. Args: what `simulate.json` holds."""
    head, rows = columns(result)
    body = "\n".join(markdown.table(head, rows))
    return f"{headline(result['made_by'])}; `{result['command']}`. {READ}\n\n{body}"


def to_rich(result: Mapping[str, Any]) -> rich.table.Table:
    """Returns the table for a terminal."""
    head, rows = columns(result)
    table = rich.table.Table(*head)
    for row in rows:
        table.add_row(*row)
    return table


def columns(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows: one for each problem and granularity, with a cell for each rule."""
    rules = list(dict.fromkeys(run["rule"] for run in result["runs"]))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for run in result["runs"]:
        cell = f"{_short(max(run['distance']))} ({_short(max(run['whole']))})"
        rows.setdefault((run["problem"], run["granularity"]), {})[run["rule"]] = cell
    starts = {problem["name"]: _short(max(problem["distance"])) for problem in result["problems"]}
    head = ["problem", "granularity", "at the start", *rules]
    return head, [
        [problem, granularity, starts[problem], *(cells.get(rule, "") for rule in rules)]
        for (problem, granularity), cells in rows.items()
    ]


def _short(value: float) -> str:
    return "0" if value < SMALL else f"{value:.2g}"
