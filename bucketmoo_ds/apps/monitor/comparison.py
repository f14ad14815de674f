"""Compares methods by their held-out results, language by language and seed by seed, and says in words who won.

All differences are paired: a method minus the baseline with the same seed. Lower is better. A few seeds show a
direction, not significance, so that no verdict speaks of significance.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bucketmoo_ds.apps.monitor.records import MetricsError


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method against the baseline, over the seeds that both have finished.

    Args:
        by_seed: for each seed, the mean over the languages of method minus baseline; negative is better.
        mean: over the seeds.
        deviation: the standard deviation over the seeds (n - 1); `None` for a single seed.
        better: the number of seeds in which the method was better.
        changes: the change of each language, averaged over the seeds.
        outcome: "better" (in every seed), "mixed" (better on average, not in every seed), or "not better".
        verdict: the same in plain words.
    """

    by_seed: dict[int, float]
    mean: float
    deviation: float | None
    better: int
    changes: dict[str, float]
    outcome: str
    verdict: str = ""

    @property
    def worst_language(self) -> str:
        """The language with the greatest change: the least improvement, or the most harm."""
        return greatest(self.changes)

    @property
    def worst_change(self) -> float:
        """The change of `worst_language`."""
        return self.changes[self.worst_language]


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One method on one group of languages.

    Args:
        seeds: those with a finite result for every language of the group.
        values: each language, averaged over the seeds; empty without seeds.
        mean: over the languages; NaN without seeds.
        worst_language: the language with the highest value, `None` without seeds.
        difference: to the baseline; `None` for the baseline, or where the two have no seed in common.
    """

    method: str
    seeds: tuple[int, ...]
    values: dict[str, float]
    mean: float
    worst_language: str | None
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class Group:
    """The languages that were trained on ("seen"), or those that were not ("unseen").

    Args:
        headline: who beat the baseline, in one sentence, or that nobody did.
        base: the values before training, of the languages that have one.
    """

    name: str
    languages: tuple[str, ...]
    base: dict[str, float]
    results: tuple[MethodResult, ...]
    headline: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of all methods; `seconds` is the mean time of a run, for the methods that have one."""

    title: str
    unit: str
    baseline: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    groups: tuple[Group, ...]
    seconds: dict[str, float]


def compare(results: Mapping[str, Any]) -> Comparison:
    """Compares the methods of a `results.json`.

    Args:
        results: `unit`, `baseline`, `methods`, `seeds`, `seen`, `unseen`, `values[method][seed][language]`, and
            where known `title`, `base[language]` and `seconds[method][seed]`. Runs that are missing, or whose value
            is `None` or not finite, leave their seed out of that method, and the verdict says so.

    Raises:
        MetricsError: a key is missing, or the baseline is none of the methods.
    """
    missing = [key for key in ("baseline", "methods", "seeds", "seen", "values") if key not in results]
    if missing:
        raise MetricsError(f"results: missing {', '.join(missing)}")
    methods, baseline = tuple(results["methods"]), results["baseline"]
    if baseline not in methods:
        raise MetricsError(f'results: baseline = "{baseline}": expected one of the methods {", ".join(methods)}')
    seeds = tuple(int(seed) for seed in results["seeds"])
    unit = results.get("unit", "bits per byte")
    values = {method: _by_seed(results["values"].get(method, {})) for method in methods}
    times = {method: list(_by_seed(results.get("seconds", {}).get(method, {})).values()) for method in methods}
    names = (("seen", tuple(results["seen"])), ("unseen", tuple(results.get("unseen", ()))))
    return Comparison(
        title=results.get("title", "Comparison of methods"),
        unit=unit,
        baseline=baseline,
        methods=methods,
        seeds=seeds,
        groups=tuple(
            _Group(
                name=name,
                languages=languages,
                baseline=baseline,
                seeds=seeds,
                unit=unit,
                runs={method: _complete(runs, languages, seeds) for method, runs in values.items()},
            ).judge(results.get("base") or {})
            for name, languages in names
            if languages
        ),
        seconds={method: statistics.fmean(known) for method, known in times.items() if known},
    )


def _by_seed(runs: Mapping[Any, Any]) -> dict[int, Any]:
    # JSON turns the seeds of an object into strings; a results object that never was a file has numbers.
    return {int(seed): value for seed, value in runs.items()}


@dataclasses.dataclass(frozen=True)
class _Group:
    """What the results of one group of languages are judged by; `runs[method][seed][language]` of complete seeds."""

    name: str
    languages: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    unit: str
    runs: dict[str, dict[int, dict[str, float]]]

    def judge(self, base: Mapping[str, float | None]) -> Group:
        results = tuple(self._result(method) for method in self.runs)
        known = {language: value for language in self.languages if (value := base.get(language)) is not None}
        return Group(self.name, self.languages, known, results, self._headline(results))

    def _result(self, method: str) -> MethodResult:
        runs = list(self.runs[method].values())
        values = {language: statistics.fmean(run[language] for run in runs) for language in self.languages if runs}
        return MethodResult(
            method=method,
            seeds=tuple(self.runs[method]),
            values=values,
            mean=statistics.fmean(values.values()) if values else math.nan,
            worst_language=greatest(values) if values else None,
            difference=None if method == self.baseline else self._difference(method),
        )

    def _difference(self, method: str) -> Difference | None:
        runs, base = self.runs[method], self.runs[self.baseline]
        change = {
            seed: {language: run[language] - base[seed][language] for language in self.languages}
            for seed, run in runs.items()
            if seed in base
        }
        if not change:
            return None
        by_seed = {seed: statistics.fmean(changes.values()) for seed, changes in change.items()}
        mean = statistics.fmean(by_seed.values())
        better = sum(value < 0 for value in by_seed.values())
        found = Difference(
            by_seed=by_seed,
            mean=mean,
            deviation=statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
            better=better,
            changes={name: statistics.fmean(row[name] for row in change.values()) for name in self.languages},
            outcome="not better" if mean >= 0 else "better" if better == len(by_seed) else "mixed",
        )
        return dataclasses.replace(found, verdict=self._verdict(found))

    def _verdict(self, found: Difference) -> str:
        count = f"{found.better} of {len(found.by_seed)} seed{'s' * (len(found.by_seed) > 1)}"
        spread = "" if found.deviation is None else f" ± {amount_text(found.deviation)}"
        amount = f"{amount_text(abs(found.mean))}{spread} {self.unit}"
        if found.outcome == "better":
            parts = [f"better than {self.baseline} in {count} by {amount}"]
        elif found.outcome == "mixed":
            parts = [f"NOT clearly better than {self.baseline}: better in only {count}, by {amount} on average"]
        elif found.mean > 0:
            parts = [f"NOT better than {self.baseline}: worse by {amount}, better in {count}"]
        else:
            parts = [f"NOT better than {self.baseline}: the same on average, better in {count}"]
        if found.mean < 0 < found.worst_change:
            parts.append(f"{found.worst_language} got worse by {amount_text(found.worst_change)}")
        if len(found.by_seed) == 1:
            parts.append("a single seed, so its spread is unknown")
        unpaired = [str(seed) for seed in self.seeds if seed not in found.by_seed]
        if unpaired:
            parts.append(f"no pair of results for seed{'s' * (len(unpaired) > 1)} {', '.join(unpaired)}")
        return "; ".join(parts)

    def _headline(self, results: Sequence[MethodResult]) -> str:
        compared = {result.method: result.difference for result in results if result.difference is not None}
        if not compared:
            return f"No method can be compared with {self.baseline} on the {self.name} languages."
        winners = {method: found for method, found in compared.items() if found.outcome == "better"}
        if not winners:
            return f"No method was better than {self.baseline} in every seed on the {self.name} languages."
        best = min(winners, key=lambda method: winners[method].mean)
        others = [method for method in compared if method not in winners]
        tail = f" Not better in every seed: {', '.join(others)}." if others else ""
        gain = amount_text(-winners[best].mean)
        return f"Largest gain over {self.baseline} on the {self.name} languages: {best}, {gain} {self.unit}.{tail}"


def _complete(
    runs: Mapping[int, Any], languages: Sequence[str], seeds: Sequence[int]
) -> dict[int, dict[str, float]]:
    kept = {}
    for seed in seeds:
        values = runs.get(seed) or {}
        found = {name: float(values[name]) for name in languages if values.get(name) is not None}
        if len(found) == len(languages) and all(map(math.isfinite, found.values())):
            kept[seed] = found
    return kept


def greatest(values: Mapping[str, float]) -> str:
    """Returns the name with the highest value, the first of equals."""
    return max(values, key=lambda name: values[name])


def amount_text(value: float) -> str:
    """Three decimals, or two digits for what three decimals would show as nothing."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"
