"""Plots a kernel benchmark: how far each op is from the memory floor, and how much faster than torch, over K."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

from bucketmoo_ds.apps.bench.cases import OPS
from bucketmoo_ds.apps.bench.table import threads_text
from bucketmoo_ds.apps.monitor.plots import COLORS, DPI, LINES, STYLE

# What a row of panels shows: the column of a line, and the axis.
ROWS = (("times_floor", "time by the floor"), ("vs_torch", "times as fast as torch"))
INCHES = (3.1, 2.5)  # of a panel


def plot(result: Mapping[str, Any]) -> bytes | None:
    """Draws the ops on a shard of one segment, for each K the largest S that was measured, a line for each backend and
    dtype.

    Args:
        result: what `bucketmoo bench kernels --json` prints.

    Returns:
        A PNG; `None` where only `min_norm` was measured, which moves no rows, or only shards of many segments.
    """
    whole = [line for line in result["lines"] if line["segments"] == 1]
    if not whole:
        return None
    largest: dict[int, int] = {}
    for line in whole:
        largest[line["K"]] = max(line["S"], largest.get(line["K"], 0))
    lines = [line for line in whole if line["S"] == largest[line["K"]]]
    ops = [op for op in OPS if any(line["op"] == op for line in lines)]
    series = list(dict.fromkeys((line["backend"], line["dtype"]) for line in lines))
    with matplotlib.style.context(STYLE, after_reset=True):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05)
        size = (max(INCHES[0] * len(ops), 6.2) + 1.4, INCHES[1] * len(ROWS) + 0.6)
        figure = Figure(figsize=size, dpi=DPI, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(ROWS), len(ops), squeeze=False, sharex=True, sharey="row")
        for row, (value, label) in enumerate(ROWS):
            for axes, op in zip(grid[row], ops, strict=True):
                _panel(axes, [line for line in lines if line["op"] == op], series, value)
            grid[row, 0].set_ylabel(label)
            grid[row, 0].set_ylim(bottom=0)  # shared, and only now are all lines in it
        for column, op in enumerate(ops):
            grid[0, column].set_title(op)
            grid[-1, column].set_xlabel("K, languages")
        handles = {handle.get_label(): handle for axes in grid.flat for handle in axes.get_lines()[1:]}
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", handlelength=3)
        machine = result["machine"]
        device = machine["gpu"] if result["device"] == "cuda" else f"{machine['cpu']}, {threads_text(result)}"
        shards = " to ".join(f"{bound:,}" for bound in sorted({min(largest.values()), max(largest.values())}))
        figure.suptitle(f"{device}, S = {shards}", x=0.01, ha="left", fontsize=11, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, lines: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str]], value: str) -> None:
    backends, dtypes = (list(dict.fromkeys(names)) for names in zip(*series, strict=True))
    axes.axhline(1, color="#444444", linewidth=1)
    for backend, dtype in series:
        points = sorted(
            (line["K"], line[value])
            for line in lines
            if (line["backend"], line["dtype"]) == (backend, dtype) and line[value] is not None
        )
        if points:
            color = COLORS[backends.index(backend) % len(COLORS)]
            style = LINES[dtypes.index(dtype) % len(LINES)]
            axes.plot(
                *zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=3.5,
                label=f"{backend} {dtype}",
            )  # fmt: skip
    counts = sorted({line["K"] for line in lines})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
