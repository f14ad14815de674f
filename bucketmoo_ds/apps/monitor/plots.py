"""Plots of runs and comparisons, drawn with matplotlib's Agg canvas: the same data gives the same PNG, byte for byte.

Colours are Okabe and Ito's, which people with colour-blindness tell apart; with more than seven lines the line style
changes too, and every line carries its name at its end.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bucketmoo_ds.apps.monitor.comparison import Comparison
from bucketmoo_ds.apps.monitor.history import Curve, Floats, mean_curve

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00")
LINES = ("-", (0, (5, 2)), (0, (1, 1.3)))
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a language may be called "$x$"
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "axes.edgecolor": "#888888",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}
DPI = 130
MAX_PAIRS = 30  # rows of the heatmap; twelve languages have 66 pairs, and the matrix shows them all


def language_curves(curves: Mapping[str, Curve], title: str, quantity: str) -> bytes | None:
    """Draws one line for each language over the optimizer steps.

    Args:
        curves: a curve for each language; languages without a point are left out.
        title: what is shown.
        quantity: the y axis with its unit, such as `bits per byte`.

    Returns:
        A PNG, or `None` where no language has a point.
    """
    filled = {name: curve for name, curve in curves.items() if curve.steps.size}
    if not filled:
        return None
    with _figure(8.0, 4.4) as figure:
        axes = figure.subplots()
        ends = [(name, _draw(axes, curve, index), index) for index, (name, curve) in enumerate(filled.items())]
        axes.set(title=title, xlabel="optimizer steps", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _robust_limits(axes, [_smooth(curve.values) for curve in filled.values()])
        _name_lines(axes, ends)
        return _png(figure)


def method_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], title: str, quantity: str) -> bytes | None:
    """Draws a small panel for each language, in it one line for each method.

    Args:
        curves: `curves[language][method]`, a curve for each seed. The line is their mean over the steps that all
            seeds have, the band reaches from the least to the greatest.
        title: what is shown.
        quantity: the y axis with its unit.

    Returns:
        A PNG, or `None` where there is no point at all.
    """
    means = {
        language: {name: mean_curve(seeds) for name, seeds in by_method.items()}
        for language, by_method in curves.items()
    }
    means = {
        language: filled
        for language, by_method in means.items()
        if (filled := {name: found for name, found in by_method.items() if found[0].steps.size})
    }
    if not means:
        return None
    methods = list(dict.fromkeys(name for by_method in curves.values() for name in by_method))
    columns = min(4, len(means))
    rows = math.ceil(len(means) / columns)
    with _figure(max(5.2, 2.7 * columns), 1.0 + 2.1 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        handles = {}
        for axes, (language, by_method) in zip(grid.flat, means.items(), strict=False):
            for name, (curve, low, high) in by_method.items():
                look = _look(methods.index(name))
                (handles[name],) = axes.plot(curve.steps, curve.values, **look, **_marker(curve))
                axes.fill_between(curve.steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
            axes.set_title(language)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axes in list(grid.flat)[len(means) :]:
            axes.set_axis_off()
        figure.supxlabel("optimizer steps", fontsize=9)
        figure.supylabel(quantity, fontsize=9)
        ordered = [name for name in methods if name in handles]
        _title(figure, title)
        figure.legend([handles[name] for name in ordered], ordered, loc="outside right upper")
        return _png(figure)


def cosine_heatmap(cosine: Floats, languages: Sequence[str], blocks: Sequence[str]) -> bytes | None:
    """Draws the mean cosine of every two languages: over all blocks as a matrix, and pair by block.

    Args:
        cosine: `[B, K, K]`, NaN where unknown.
        languages: K names.
        blocks: B names.

    Returns:
        A PNG, or `None` where no cosine is known.
    """
    K = len(languages)
    upper = np.triu_indices(K, 1)
    by_pair = cosine[:, upper[0], upper[1]].T
    if not np.isfinite(by_pair).any():
        return None
    matrix = _mean(cosine, axis=0)
    matrix[np.diag_indices(K)] = np.nan
    limit = min(1.0, max(0.1, math.ceil(10 * float(np.nanmax(np.abs(by_pair)))) / 10))
    shown = min(len(by_pair), MAX_PAIRS) if len(blocks) > 1 else 0
    side = max(2.4, 0.46 * K)
    width = max(3.4, min(9.0, 0.3 * len(blocks))) if shown else 0.0
    with _figure(side + width + (2.6 if shown else 2.0), max(side, 0.17 * shown) + 1.7) as figure:
        panels = figure.subplots(1, 2 if shown else 1, squeeze=False, width_ratios=[side, width] if shown else None)[0]
        look = {"cmap": _diverging(), "vmin": -limit, "vmax": limit}
        image = panels[0].imshow(np.ma.masked_invalid(matrix), aspect="auto", **look)
        for i, j in np.argwhere(np.isfinite(matrix)):
            tone = "white" if abs(matrix[i, j]) > 0.6 * limit else "#222222"
            panels[0].text(j, i, _cell(float(matrix[i, j])), ha="center", va="center", fontsize=7, color=tone)
        panels[0].set_title("mean over steps and blocks" if shown else f"{_short(blocks[0])}, mean over steps")
        panels[0].set_xticks(range(K), languages, rotation=90 if K > 6 else 0, fontsize=8)
        panels[0].set_yticks(range(K), languages, fontsize=8)
        if shown:
            pair_mean = _mean(by_pair, axis=1)
            order = np.argsort(np.where(np.isfinite(pair_mean), pair_mean, np.inf), kind="stable")[:shown]
            panels[1].imshow(np.ma.masked_invalid(by_pair[order]), aspect="auto", interpolation="nearest", **look)
            few = "all" if shown == len(by_pair) else f"{shown} most conflicting of {len(by_pair)}"
            panels[1].set_title(f"mean over steps, {few} pairs")
            names = [f"{languages[upper[0][pair]]}, {languages[upper[1][pair]]}" for pair in order]
            panels[1].set_yticks(range(shown), names, fontsize=8)
            ticks = range(0, len(blocks), math.ceil(len(blocks) / 30))
            panels[1].set_xticks(ticks, [_short(blocks[block]) for block in ticks], rotation=90, fontsize=7)
        for axes in panels:
            axes.grid(False)
            axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02, aspect=25)
        bar.set_label("cosine (below 0: conflict; grey: no value)")
        bar.outline.set_visible(False)
        _title(figure, "Cosine between languages")
        return _png(figure)


def weights_over_time(
    steps: NDArray[np.int64], weights: Floats, languages: Sequence[str], blocks: Sequence[str], chosen: int = 3
) -> bytes | None:
    """Draws the weights of the languages over the steps: the mean over all blocks, and the blocks that spread most.

    Args:
        steps: `[n]`.
        weights: `[n, B, K]`, NaN for absent languages.
        languages: K names.
        blocks: B names.
        chosen: how many single blocks get a panel.

    Returns:
        A PNG, or `None` without weights.
    """
    if not np.isfinite(weights).any():
        return None
    over_time = _mean(weights, axis=0)
    spread = np.ptp(np.nan_to_num(over_time, nan=1 / len(languages)), axis=1)
    picked = sorted(map(int, np.argsort(-spread, kind="stable")[: chosen if len(blocks) > 1 else 0]))
    first = "mean over all blocks" if len(blocks) > 1 else f"block {_short(blocks[0], 44)}"
    panels = [(first, _mean(weights, axis=1))]
    panels += [(f"block {_short(blocks[index], 44)}", weights[:, index]) for index in picked]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure(5.2 * columns, 0.8 + 2.9 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes, (name, values) in zip(grid.flat, panels, strict=False):
            ends: list[tuple[str, float, int]] = []
            for index, language in enumerate(languages):
                known = np.isfinite(values[:, index])
                if known.any():
                    end = _draw(axes, Curve(steps[known], values[known, index]), index)
                    ends.append((language, end, index))
            axes.axhline(1 / len(languages), color="#888888", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _name_lines(axes, ends)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel("optimizer steps", fontsize=9)
        figure.supylabel("weight (no unit)", fontsize=9)
        _title(figure, f"Weights of the languages (dotted: 1/{len(languages)}, averaging)")
        return _png(figure)


def differences(comparison: Comparison) -> bytes | None:
    """Draws, for each language, the paired change of every method against the baseline, averaged over seeds.

    The row "mean" shows each seed as a small ring.

    Returns:
        A PNG, or `None` where no method can be compared.
    """
    methods = [method for method in comparison.methods if method != comparison.baseline]
    groups = [group for group in comparison.groups if any(result.difference for result in group.results)]
    if not groups:
        return None
    heights = [len(group.languages) + 1 for group in groups]
    row_height = 0.13 + 0.11 * len(methods)
    with _figure(7.6, 1.2 + 0.45 * len(groups) + row_height * sum(heights)) as figure:
        grid = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)
        handles = {}
        for axes, group in zip(grid.flat, groups, strict=True):
            for result in group.results:
                found = result.difference
                if found is None:
                    continue
                index = methods.index(result.method)
                offset = 0.62 * ((index + 0.5) / len(methods) - 0.5)
                color = _look(comparison.methods.index(result.method))["color"]  # as in the curves
                values = [found.mean, *(found.changes[language] for language in group.languages)]
                rows = np.arange(len(values)) + offset
                axes.hlines(rows, 0, values, color=color, linewidth=1.4, alpha=0.5)
                (handles[result.method],) = axes.plot(values, rows, "o", color=color, markersize=4.5)
                seeds = list(found.by_seed.values())
                axes.plot(seeds, [offset] * len(seeds), "o", markersize=3.5, markerfacecolor="none", color=color)
            axes.axvline(0, color="#444444", linewidth=1)
            axes.set_yticks(range(len(group.languages) + 1), ["mean", *group.languages])
            axes.set_ylim(len(group.languages) + 0.5, -0.5)
            axes.axhspan(-0.5, 0.5, color="#f1f1f1", zorder=0, linewidth=0)
            axes.set_title("languages trained on" if group.name == "seen" else "languages not trained on")
        grid[-1, 0].set_xlabel(
            f"{comparison.unit}, method minus {comparison.baseline} (left of 0 is better; rings: single seeds)"
        )
        _title(figure, f"Change against {comparison.baseline}")
        figure.legend(list(handles.values()), list(handles), loc="outside right upper")
        return _png(figure)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure that no user's matplotlibrc changes, and that pyplot does not know of. Inches."""
    with matplotlib.style.context(STYLE, after_reset=True):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05)
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # matplotlib would write its version into the file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _look(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index // len(COLORS) % len(LINES)]}


def _marker(curve: Curve) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if curve.steps.size <= 12 else {}


def _draw(axes: Any, curve: Curve, index: int) -> float:
    """Draws a curve, smoothed over its own faint self where it has many points; returns where it ends."""
    look, smooth = _look(index), _smooth(curve.values)
    if smooth is not curve.values:
        axes.plot(curve.steps, curve.values, color=look["color"], linewidth=0.6, alpha=0.22)
    axes.plot(curve.steps, smooth, **look, **_marker(curve))
    return float(smooth[-1])


def _name_lines(axes: Any, ends: Sequence[tuple[str, float, int]]) -> None:
    """Writes each line's name (name, end, index) right of its end, apart where names would lie on each other."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = axes.get_figure().get_figheight() / axes.get_subplotspec().get_gridspec().nrows
    gap = 0.155 / (0.72 * height)  # a line of text, as a fraction of the axes
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [min(1.0, max(0.0, (end - low) / (high - low))) for _, end, _ in ends]
    for (name, _, index), value, place in zip(ends, wanted, _spread(wanted, gap), strict=True):
        look = _look(index)
        axes.annotate(
            _short(name, 16),
            xy=(1.0, value),
            xytext=(1.055, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=look["color"],
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5), **look},
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Moves ascending positions so that neighbours are `gap` apart, and into 0..1 if they fit.

    Positions that are too close form a cluster, centred on their mean.
    """
    clusters: list[list[float]] = []
    for position in wanted:
        cluster = [position]
        while clusters and _centre(cluster, gap) - _centre(clusters[-1], gap) < gap * len(clusters[-1] + cluster) / 2:
            cluster = clusters.pop() + cluster
        clusters.append(cluster)
    return [
        _centre(cluster, gap) + gap * (index - (len(cluster) - 1) / 2)
        for cluster in clusters
        for index in range(len(cluster))
    ]


def _centre(cluster: Sequence[float], gap: float) -> float:
    half = min(0.5, gap * (len(cluster) - 1) / 2)
    return min(1 - half, max(half, sum(cluster) / len(cluster)))


def _smooth(values: Floats) -> Floats:
    """A centred moving average over a twentieth of the points; `values` itself where there are few."""
    half = values.size // 40
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    return (sums[stop] - sums[start]) / (stop - start)


def _robust_limits(axes: Any, lines: Sequence[Floats]) -> None:
    """Cuts off a first point that would squeeze all others into the bottom: the eye needs the end of training."""
    rest = np.concatenate([line[max(1, line.size // 20) :] if line.size > 3 else line for line in lines])
    whole = np.concatenate(list(lines))
    if whole.max() - rest.min() > 2.5 * (rest.max() - rest.min()) > 0:
        margin = 0.06 * (rest.max() - rest.min())
        axes.set_ylim(rest.min() - margin, rest.max() + margin)


def _mean(values: Floats, axis: int) -> Floats:
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _cell(value: float) -> str:
    # Adding 0 turns -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1)


def _diverging() -> Any:
    # Orange for conflict, blue for agreement: apart for every kind of colour-blindness.
    return matplotlib.colormaps["PuOr"].with_extremes(bad="#dddddd")


def _short(name: str, length: int = 26) -> str:
    """Cuts a long name in its middle: the number of a bucket stands in front, what tells parameters apart behind."""
    head = length // 3
    return name if len(name) <= length else f"{name[:head].rstrip()}…{name[head + 1 - length :]}"
