"""Renders a comparison: one table of strings for each group of languages, then Markdown, terminal or HTML."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence

import rich.console
import rich.padding
import rich.table
import rich.text

from bucketmoo_ds.apps.monitor.comparison import Comparison, Difference, Group, MethodResult, amount_text, greatest

NO_SIGNIFICANCE = (
    "± is the standard deviation over the seeds of the paired differences, not a confidence interval; "
    "so few seeds show a direction, they do not establish significance."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table ready to be rendered: the first column names the row; `best` holds the (row, column) to emphasise."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]]
    notes: tuple[str, ...]


def tables(comparison: Comparison) -> list[Table]:
    """Returns one table for the seen languages and one for the unseen ones, where there are any."""
    return [_table(comparison, group) for group in comparison.groups]


def to_markdown(comparison: Comparison) -> str:
    """Renders the tables, the headlines and the verdicts as Markdown."""
    parts = [f"# {_markdown(comparison.title)}"]
    for group, table in zip(comparison.groups, tables(comparison), strict=True):
        lines = [
            "| " + " | ".join(map(_markdown, table.header)) + " |",
            "|" + "---|" + "---:|" * (len(table.header) - 1),
        ]
        for row, cells in enumerate(table.rows):
            texts = [
                f"**{_markdown(cell)}**" if (row, column) in table.best else _markdown(cell)
                for column, cell in enumerate(cells)
            ]
            lines.append("| " + " | ".join(texts) + " |")
        parts += [f"## {_markdown(table.title)}", _markdown(group.headline), "\n".join(lines)]
        parts.append("\n".join(f"* {_markdown(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def to_rich(comparison: Comparison) -> rich.console.Group:
    """Renders the same for a terminal, for `rich.print`."""
    parts: list[rich.console.RenderableType] = [rich.text.Text(comparison.title, style="bold")]
    for group, table in zip(comparison.groups, tables(comparison), strict=True):
        grid = rich.table.Table(title=rich.text.Text(table.title), title_justify="left", title_style="bold")
        for column, name in enumerate(table.header):
            grid.add_column(rich.text.Text(name), justify="right" if column else "left")
        languages = len(group.languages)
        for row, cells in enumerate(table.rows):
            grid.add_row(
                *(
                    rich.text.Text(cell, style="bold green" if (row, column) in table.best else "")
                    for column, cell in enumerate(cells)
                ),
                end_section=row == languages - 1,
            )
        parts += [rich.padding.Padding(grid, (1, 0, 0, 0)), rich.text.Text(group.headline, style="bold")]
        parts += [rich.text.Text(f"  {note}") for note in table.notes]
    return rich.console.Group(*parts)


def _table(comparison: Comparison, group: Group) -> Table:
    results = group.results
    header = ["language", *(["before training"] if group.base else []), *(result.method for result in results)]
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    first = len(header) - len(results)

    def add(label: str, base: str, cell: Callable[[MethodResult], str]) -> None:
        rows.append([label, *([base] if group.base else []), *(cell(result) for result in results)])

    def mark(amounts: Sequence[float]) -> None:
        known = [round(amount, 3) for amount in amounts]
        finite = [amount for amount in known if math.isfinite(amount)]
        if len(set(finite)) > 1:
            best.update((len(rows) - 1, first + i) for i, amount in enumerate(known) if amount == min(finite))

    for language in group.languages:
        add(language, _number(group.base.get(language)), functools.partial(_value_cell, language=language))
        mark([result.values.get(language, math.nan) for result in results])
    whole_base = statistics.fmean(group.base.values()) if len(group.base) == len(group.languages) else None
    add("mean", _number(whole_base), lambda result: _number(result.mean))
    mark([result.mean for result in results])
    worst_base = f"{_number(max(group.base.values()))} ({greatest(group.base)})" if whole_base is not None else "-"
    add("worst language", worst_base, _worst_language_cell)
    mark([max(result.values.values(), default=math.nan) for result in results])
    add(f"difference to {comparison.baseline}", "", lambda result: _difference_cell(result.difference))
    add("seeds in which it was better", "", lambda result: _seeds_cell(result.difference))
    add("worst change of a language", "", lambda result: _worst_cell(result.difference))
    if comparison.seconds:
        add("seconds a run", "", lambda result: _seconds(comparison.seconds.get(result.method)))
    notes = [_note(result, comparison) for result in results if result.method != comparison.baseline]
    notes += [
        f"{result.method}: finished {len(result.seeds)} of {len(comparison.seeds)} seeds"
        for result in results
        if result.method == comparison.baseline and len(result.seeds) < len(comparison.seeds)
    ]
    seeds = f"{len(comparison.seeds)} seed{'s' * (len(comparison.seeds) != 1)}"
    return Table(
        title=f"Languages {'trained on' if group.name == 'seen' else 'not trained on'} "
        f"({comparison.unit}, lower is better, mean of {seeds})",
        header=tuple(header),
        rows=tuple(map(tuple, rows)),
        best=frozenset(best),
        notes=(*notes, NO_SIGNIFICANCE),
    )


def _note(result: MethodResult, comparison: Comparison) -> str:
    if result.difference is None:
        return f"{result.method}: no result that could be compared with {comparison.baseline}"
    return f"{result.method}: {result.difference.verdict}"


def _value_cell(result: MethodResult, language: str) -> str:
    return _number(result.values.get(language))


def _worst_language_cell(result: MethodResult) -> str:
    if result.worst_language is None:
        return "-"
    return f"{_number(result.values[result.worst_language])} ({result.worst_language})"


def _difference_cell(found: Difference | None) -> str:
    if found is None:
        return "-"
    return _signed(found.mean) + ("" if found.deviation is None else f" ± {amount_text(found.deviation)}")


def _seeds_cell(found: Difference | None) -> str:
    return "-" if found is None else f"{found.better} of {len(found.by_seed)}"


def _worst_cell(found: Difference | None) -> str:
    return "-" if found is None else f"{_signed(found.worst_change)} ({found.worst_language})"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + amount_text(value)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _markdown(text: str) -> str:
    for special in ("\\", "|", "*", "_", "`", "<", "[", "]"):
        text = text.replace(special, "\\" + special)
    return text.replace("\n", " ")
