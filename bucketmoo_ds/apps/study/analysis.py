"""From runs to differences: every arm against averaging with the same seed, at its own best rate. Lower is better.

Intervals are Student's, of 95 %, over the paired differences of the seeds. P-values of the paired t-test are corrected
for the number of arms of a scenario by Holm's method (Scand. J. Statist. 6, 1979), for each measure on its own.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from bucketmoo_ds.apps.study.design import BASE, BASELINE, TUNING_SEEDS, Scenario
from bucketmoo_ds.apps.study.runner import Runs

CONFIDENCE = 0.95
MEAN, WORST = "mean", "worst language"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A measure of an arm minus that of averaging.

    Args:
        mean, low, high: over the paired seeds, with its interval.
        p: corrected; the chance of so large a mean difference where there is none.
        better: pairs in which the arm is better.
    """

    mean: float
    low: float
    high: float
    p: float
    better: int

    @property
    def clear(self) -> bool:
        """Whether it is not 0, after the correction."""
        return self.p < 1 - CONFIDENCE


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What an arm has come to.

    Args:
        rate, variant: chosen on the tuning seeds.
        seeds: of the comparison.
        values: mean over the seeds of each measure, bits per byte.
        languages: mean over the seeds of each language.
        differences: of each measure; empty for averaging, and where fewer than two seeds are paired.
        seconds: of training, mean. looks: see `trial.run`, means.
    """

    arm: str
    rate: float
    variant: int
    seeds: tuple[int, ...]
    values: dict[str, float]
    languages: dict[str, float]
    differences: dict[str, Difference]
    seconds: float
    looks: dict[str, float]


def analyse(runs: Runs, scenario: Scenario) -> list[ArmResult]:
    """Returns the arms of a scenario that have runs of the comparison, averaging first, the best next."""
    found = {arm: _compared(runs, scenario, arm) for arm in scenario.arm_names}
    plain = found.pop(BASELINE, {})
    if not plain:
        return []
    paired = {arm: sorted(set(each) & set(plain)) for arm, each in found.items()}
    raw: dict[str, dict[str, Difference]] = {}
    for measure in _measures(plain[min(plain)], scenario):
        changes = {
            arm: [_measures(found[arm][s], scenario)[measure] - _measures(plain[s], scenario)[measure] for s in seeds]
            for arm, seeds in paired.items()
            if len(seeds) > 1
        }
        differences = {arm: _difference(each) for arm, each in changes.items()}
        for arm, p in holm({arm: each.p for arm, each in differences.items()}).items():
            raw.setdefault(arm, {})[measure] = dataclasses.replace(differences[arm], p=p)
    results = [_result(arm, each, scenario, raw.get(arm, {})) for arm, each in found.items() if each]
    results.sort(key=lambda result: result.differences[MEAN].mean if result.differences else math.inf)
    return [_result(BASELINE, plain, scenario, {}), *results]


def base_values(runs: Runs, scenario: Scenario) -> dict[str, float]:
    """Returns the measures of the base model, before any fine-tuning; empty where they are not known."""
    found = runs.of(scenario.name, BASE, [0])
    return _measures(found[0], scenario) if found else {}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns the p-values corrected for their number."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


def _compared(runs: Runs, scenario: Scenario, arm: str) -> dict[int, Mapping[str, Any]]:
    """The runs of an arm that are not tuning's, by seed; those that diverged count as such."""
    return {
        key[-1]: run
        for key, run in runs.values.items()
        if key[:2] == (scenario.name, arm) and key[-1] not in TUNING_SEEDS
    }


def _measures(run: Mapping[str, Any], scenario: Scenario) -> dict[str, float]:
    values = {name: math.inf if value is None else value for name, value in run["bits_per_byte"].items()}
    groups = {name: statistics.fmean(values[each] for each in members) for name, members in scenario.groups.items()}
    return {MEAN: statistics.fmean(values.values()), WORST: max(values.values()), **groups}


def _difference(changes: Sequence[float]) -> Difference:
    mean = statistics.fmean(changes)
    deviation = statistics.stdev(changes) / math.sqrt(len(changes)) if math.isfinite(mean) else math.nan
    better = sum(change < 0 for change in changes)
    if not deviation > 0:
        return Difference(mean, mean, mean, 1.0, better)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(changes) - 1)) * deviation
    p = 2 * float(stats.t.sf(abs(mean) / deviation, len(changes) - 1))
    return Difference(mean, mean - margin, mean + margin, p, better)


def _result(
    arm: str, by_seed: Mapping[int, Mapping[str, Any]], scenario: Scenario, differences: dict[str, Difference]
) -> ArmResult:
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    measures = [_measures(run, scenario) for run in runs]
    return ArmResult(
        arm=arm,
        rate=runs[0]["rate"],
        variant=runs[0]["variant"],
        seeds=tuple(sorted(by_seed)),
        values={name: statistics.fmean(each[name] for each in measures) for name in measures[0]},
        languages={
            name: statistics.fmean(
                math.inf if run["bits_per_byte"][name] is None else run["bits_per_byte"][name] for run in runs
            )
            for name in runs[0]["bits_per_byte"]
        },
        differences=differences,
        seconds=statistics.fmean(run["seconds"] for run in runs),
        looks={
            name: statistics.fmean(run[name] for run in runs)
            for name in ("cosine_mean", "cosine_update")
            if all(name in run for run in runs)
        },
    )
