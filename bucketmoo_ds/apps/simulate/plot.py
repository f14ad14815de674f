"""Plots the paths of a problem in the space of its two losses: a panel for each granularity, a colour for each rule."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bucketmoo_ds.apps.monitor.plots import COLORS, DPI, STYLE
from bucketmoo_ds.apps.simulate.problems import OBJECTIVES

INCHES = (2.3, 2.1)  # of a panel


def plot(result: Mapping[str, Any], name: str) -> bytes:
    """Returns a PNG. Args: what `simulate.json` holds, and the name of one of its problems."""
    runs = [run for run in result["runs"] if run["problem"] == name]
    (problem,) = (each for each in result["problems"] if each["name"] == name)
    granularities, rules = (list(dict.fromkeys(run[of] for run in runs)) for of in ("granularity", "rule"))
    with matplotlib.style.context(STYLE, after_reset=True):
        size = (INCHES[0] * len(granularities) + 1.2, INCHES[1] + 0.4)
        figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(), facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(granularities), squeeze=False, sharex=True, sharey=True)[0]
        for axes, granularity in zip(panels, granularities, strict=True):
            for front in problem["front"]:
                axes.plot(*np.asarray(front).T, color="#444444", linewidth=2.2, label="front")
            for run in (each for each in runs if each["granularity"] == granularity):
                color = COLORS[rules.index(run["rule"]) % len(COLORS)]
                for path in np.asarray(run["path"]):
                    axes.plot(*path.T, color=color, linewidth=1.1, alpha=0.85, label=run["rule"])
                    axes.plot(*path[-1], color=color, marker="o", markersize=4)
            axes.set(title=granularity, xlabel=f"{OBJECTIVES[0]} loss")
            axes.margins(0.04)
        panels[0].set_ylabel(f"{OBJECTIVES[1]} loss")
        handles = {handle.get_label(): handle for axes in panels for handle in axes.get_lines()}
        shown = {label: handle for label, handle in handles.items() if label in ("front", *rules)}
        figure.legend(list(shown.values()), list(shown), loc="outside right upper")
        figure.suptitle(f"{name}: {problem['summary']}", x=0.01, ha="left", fontsize=11, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
