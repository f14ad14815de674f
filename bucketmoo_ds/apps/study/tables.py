"""The study's results as Markdown and as plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bucketmoo_ds.apps.bench.provenance import headline
from bucketmoo_ds.apps.markdown import table
from bucketmoo_ds.apps.study.analysis import MEAN, ArmResult, Difference, analyse, base_values
from bucketmoo_ds.apps.study.design import BASELINE, SCENARIOS, TUNING_SEEDS, Scenario
from bucketmoo_ds.apps.study.runner import Runs, mean


def markdown(runs: Runs, scenarios: Sequence[Scenario] = tuple(SCENARIOS.values())) -> str:
    """Returns where the runs were made, a summary, and a table a scenario."""
    tables = (made for scenario in scenarios if (made := scenario_table(runs, scenario)))
    commits = sorted({str(head["commit"])[:12] for head in runs.heads})
    made = f"{headline(runs.heads[-1])}; {len(runs.values)} runs" if runs.heads else "no runs"
    more = f" by commits {', '.join(commits)}" if len(commits) > 1 else ""
    return "\n\n".join([f"{made}{more}.", summary(runs, scenarios), *tables])


def summary(runs: Runs, scenarios: Sequence[Scenario] = tuple(SCENARIOS.values())) -> str:
    """Returns a row a scenario and measure: the arms clearly better than averaging, worse, and neither."""
    rows = []
    for scenario in scenarios:
        results = [each for each in analyse(runs, scenario)[1:] if each.differences]
        for measure in results[0].differences if results else ():
            judged = [(each.arm, each.differences[measure]) for each in results]
            better = [f"{arm} {found.mean:+.3f}" for arm, found in judged if found.clear and found.mean < 0]
            worse = [f"{arm} {found.mean:+.3f}" for arm, found in judged if found.clear and found.mean > 0]
            unclear = [arm for arm, found in judged if not found.clear]
            rows.append((scenario.name, measure, *("; ".join(each) for each in (better, worse, unclear))))
    return "\n".join(table(("scenario", "measure", "better than averaging", "worse", "no clear difference"), rows))


def scenario_table(runs: Runs, scenario: Scenario) -> str:
    """Returns the table of one scenario, empty where it has no runs of averaging."""
    results = analyse(runs, scenario)
    if not results:
        return ""
    plain = results[0]
    measures = list(plain.values)
    head = ["arm", "rate", *(f"{name}, minus averaging" for name in measures), "seeds", "cos mean", "cos step", "s"]
    values = ", ".join(f"{name} {plain.values[name]:.3f}" for name in measures)
    base = "; ".join(f"{name} {value:.3f}" for name, value in base_values(runs, scenario).items())
    told = (
        f"**{scenario.name}**: {scenario.summary}. Averaging, at its best rate {plain.rate:g}"
        f"{_variant(scenario, plain)}, has {values} bits per byte" + (f" (base model: {base})." if base else ".")
    )
    rows = (
        (
            each.arm + _variant(scenario, each),
            f"{each.rate:g}",
            *(_cell(each.differences.get(name)) for name in measures),
            str(len(each.seeds)),
            _number(each.looks.get("cosine_mean")),
            _number(each.looks.get("cosine_update")),
            f"{each.seconds:.0f}",
        )
        for each in results[1:]
    )
    return "\n".join([told, "", *table(head, rows)])


def plot_differences(runs: Runs, path: Path, scenarios: Sequence[Scenario] = tuple(SCENARIOS.values())) -> bool:
    """Draws the mean's difference of every arm in every scenario, with its interval; returns whether there is one."""
    from matplotlib.figure import Figure

    found = [(scenario, analyse(runs, scenario)[1:]) for scenario in scenarios]
    found = [(scenario, [each for each in results if each.differences]) for scenario, results in found]
    found = [(scenario, results) for scenario, results in found if results]
    if not found:
        return False
    figure = Figure(figsize=(9, 0.6 + 0.5 * len(found) + 0.2 * sum(len(results) for _, results in found)), dpi=100)
    heights = [len(results) + 1 for _, results in found]
    grid = figure.add_gridspec(len(found), 1, height_ratios=heights, hspace=0.5)
    for place, (scenario, results) in enumerate(found):
        axes = figure.add_subplot(grid[place])
        for row, each in enumerate(reversed(results)):
            difference = each.differences[MEAN]
            colour = "0.55" if not difference.clear else "tab:green" if difference.mean < 0 else "tab:red"
            axes.plot([difference.low, difference.high], [row, row], color=colour, linewidth=2)
            axes.plot(difference.mean, row, "o", color=colour, markersize=4)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_yticks(range(len(results)), [each.arm for each in reversed(results)], fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{scenario.name}: {scenario.summary}", fontsize=8, loc="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.set_xlabel("bits per byte minus averaging's (negative is better), 95 % interval", fontsize=8)
    figure.savefig(path, bbox_inches="tight")
    return True


def plot_rates(runs: Runs, path: Path, scenario: Scenario) -> bool:
    """Draws bits per byte over the learning rate, of the tuning seeds: one rate for all would be no comparison. Returns
    whether there is something to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100)
    axes = figure.add_subplot()
    for arm in scenario.arm_names:
        by_rate: dict[float, list[float]] = {}
        for run in runs.of(scenario.name, arm, TUNING_SEEDS):
            if run["variant"] == 0:
                by_rate.setdefault(run["rate"], []).append(mean(run))
        points = [(rate, statistics.fmean(each)) for rate, each in sorted(by_rate.items())]
        if len(points) > 1:
            width = 2.5 if arm == BASELINE else 1.2
            axes.plot(*zip(*points, strict=True), "o-", label=arm, linewidth=width, markersize=4)
    if not axes.lines:
        return False
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("bits per byte, mean of the languages")
    axes.set_title(f"{scenario.name}: {scenario.summary}", fontsize=8, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight")
    return True


def _variant(scenario: Scenario, result: ArmResult) -> str:
    if not result.variant:
        return ""
    changes: Any = scenario.arm(result.arm).variants[result.variant - 1]
    return f" ({', '.join(f'{name} {value}' for name, value in changes.items())})"


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    return f"**{text}**" if difference.clear else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
