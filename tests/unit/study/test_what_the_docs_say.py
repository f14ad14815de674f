"""What docs/study.md, docs/choosing.md and the README say came out, held by the committed runs: one that is added, and
makes a sentence wrong, fails here."""

import statistics
from pathlib import Path

import pytest

from bucketmoo_ds.apps.study import analysis, runner
from bucketmoo_ds.apps.study.analysis import MEAN, WORST, ArmResult
from bucketmoo_ds.apps.study.design import BASELINE, SCENARIOS, TUNING_SEEDS
from bucketmoo_ds.config import BucketMOOConfig

RUNS = runner.Runs.read(Path(__file__).parents[3] / "benchmarks" / "results" / "study.jsonl")
FOUND = {name: {each.arm: each for each in analysis.analyse(RUNS, scenario)} for name, scenario in SCENARIOS.items()}


def of(arm: str) -> dict[str, ArmResult]:
    """An arm's results in the scenarios in which it has been compared."""
    return {name: arms[arm] for name, arms in FOUND.items() if arm in arms and arms[arm].differences}


def test_the_default_is_never_clearly_worse_and_nowhere_above_a_hundredth_and_a_half() -> None:
    results = of(BucketMOOConfig(languages=("de",)).aggregator)
    assert {"balanced", "unbalanced", "adding", "late"} <= results.keys()
    differences = [each for result in results.values() for each in result.differences.values()]
    assert not any(each.clear for each in differences)
    assert all(result.differences[MEAN].mean <= 0 for result in results.values())
    assert -0.015 < min(result.differences[MEAN].mean for result in results.values()) < -0.01
    alone = [name for name, result in results.items() if result.differences[MEAN].high < 0]
    assert alone == ["balanced", "unbalanced"]


def test_plain_mgda_hurts_the_worst_language() -> None:
    result = of("mgda")["balanced"].differences
    assert result[WORST].clear and result[WORST].mean > 0.05 and result[MEAN].mean > 0


def test_rules_that_forget_less() -> None:
    for arm in ("cagrad", "mgda rescaled"):
        old = of(arm)["adding"].differences["old"]
        assert old.clear and -0.01 < old.mean < 0
    assert of("mgda rescaled")["adding"].differences[MEAN].clear


def test_tuned_static_weights_gain_as_much_as_a_rule_and_mostly_at_the_worst_languages_cost() -> None:
    results = of("static by loss")
    better = [
        name for name, each in results.items() if each.differences[MEAN].clear and each.differences[MEAN].mean < 0
    ]
    assert better == ["balanced", "libreoffice", "gemma"]
    worse = [
        name for name, each in results.items() if each.differences[WORST].clear and each.differences[WORST].mean > 0
    ]
    assert worse == ["balanced", "unbalanced", "adding"]


def test_random_weights_are_worse() -> None:
    results = of("random weights")
    assert all(each.differences[MEAN].mean > 0 for each in results.values())
    assert [name for name, each in results.items() if each.differences[MEAN].clear] == ["balanced", "adding"]


def test_the_step_and_the_gradient() -> None:
    for name, arms in FOUND.items():
        for each in arms.values():
            low, high = (0.15, 0.25) if name == "gemma" else (0.3, 0.35)
            assert low < each.looks["cosine_update"] < high
            assert each.looks.get("cosine_mean", 1.0) > 0.8


def test_a_rate_of_twice_or_half_costs_more_than_a_rule_gains() -> None:
    rates: dict[float, list[float]] = {}
    for run in RUNS.of("balanced", BASELINE, TUNING_SEEDS):
        rates.setdefault(run["rate"], []).append(runner.mean(run))
    means = {rate: statistics.fmean(each) for rate, each in rates.items()}
    best = min(means, key=lambda rate: means[rate])
    for factor in (0.5, 2.0):
        assert means[best * factor] - means[best] == pytest.approx(0.085, abs=0.02)


def test_late_says_little() -> None:
    """Averaging's best rate is the lowest that the grid may go to."""
    scenario = SCENARIOS["late"]
    assert FOUND["late"][BASELINE].rate == scenario.rate / scenario.factor**runner._LONGEST_GRID
