"""The study's runs: what is tuned on what, what is made once, and what the analysis makes of it."""

import argparse
import dataclasses
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from draw import SEED
from scipy import stats

from bucketmoo_ds.apps.cli import study
from bucketmoo_ds.apps.study import analysis, runner, tables
from bucketmoo_ds.apps.study.design import BASELINE, SCENARIOS, TUNING_SEEDS, Arm, Scenario

LANGUAGES = ("de", "fr", "ko")
TINY = Scenario(
    name="tiny",
    summary="nothing is trained",
    languages=LANGUAGES,
    rate=1.0,
    arms=(BASELINE, "cagrad", "upgrad"),
    extra=(Arm(name="fast", rule="mgda", variants=({"rescale": "mean"},)),),
    groups={"low": ("ko",)},
)
SEEDS = (0, 1, 2, 3)
# The best rate of each arm, as a power of two, and its best value there.
BEST = {BASELINE: (0, 3.0), "cagrad": (3, 2.9), "upgrad": (-1, 3.1), "fast": (1, 3.0)}


class Made(list[tuple[str, float, int, str]]):
    """Stands for training: a parabola around each arm's best rate, with the seed's and a little of its own noise."""

    def __call__(self, plan: runner.Plan, scenario: Scenario, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        self.append((arm.name, rate, seed, arm.rescale))
        if rate == 0:
            return {"bits_per_byte": dict.fromkeys(LANGUAGES, 9.0), "seconds": 0.0}
        if rate > 2**6:
            return {"bits_per_byte": dict.fromkeys(LANGUAGES, math.nan), "seconds": 1.0}
        exponent, value = BEST.get(arm.name, (0, 9.0))
        noise = random.Random(f"{arm.name}{rate}{seed}{SEED}").gauss(0, 1e-3)
        found = value + 0.1 * (math.log2(rate) - exponent) ** 2 + 0.05 * seed % 7 + noise
        found -= 0.5 * (arm.rescale == "mean")
        return {"bits_per_byte": {name: found + index for index, name in enumerate(LANGUAGES)}, "seconds": 1.0}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    monkeypatch.setattr(runner, "_make", made)
    monkeypatch.setitem(SCENARIOS, TINY.name, TINY)
    return made


@pytest.fixture
def plan(tmp_path: Path) -> runner.Plan:
    return runner.Plan(tmp_path / "runs.jsonl", tmp_path, tmp_path, SEEDS)


def test_each_arm_gets_its_own_best_rate_on_seeds_of_tuning_only(plan: runner.Plan, made: Made) -> None:
    for arm in TINY.arm_names:
        assert runner._cell(plan, TINY.name, arm).startswith(f"done, rate {2.0 ** BEST[arm][0]:g}")
        compared = {(rate, seed) for name, rate, seed, _ in made if name == arm and seed not in TUNING_SEEDS}
        assert compared == {(2.0 ** BEST[arm][0], seed) for seed in SEEDS}
    tuned = {rate for name, rate, seed, _ in made if name == "cagrad" and seed in TUNING_SEEDS}
    assert tuned == {2.0**exponent for exponent in range(-1, 5)}, "the grid ends one step beyond the best"
    assert len(set(made)) == len(made), "a run is made twice"
    assert {run["variant"] for run in runner.Runs.read(plan.out).of(TINY.name, "fast", SEEDS)} == {1}


def test_a_call_goes_on_where_the_last_one_has_ended(plan: runner.Plan, made: Made) -> None:
    runner._cell(plan, TINY.name, "upgrad")
    whole = plan.out.read_text().splitlines()
    plan.out.write_text("\n".join(whole[:5]) + "\n")
    before = len(made)
    runner._cell(plan, TINY.name, "upgrad")
    assert len(made) - before == len(whole) - 5
    assert sorted(plan.out.read_text().splitlines()) == sorted(whole)
    late = dataclasses.replace(plan, until=time.time() - 1, seeds=(*SEEDS, 4))
    assert runner._cell(late, TINY.name, "upgrad") == "not finished"


def test_runs_of_another_design_do_not_count(plan: runner.Plan, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    runner._cell(plan, TINY.name, "upgrad")
    known = len(runner.Runs.read(plan.out).values)
    monkeypatch.setitem(SCENARIOS, TINY.name, dataclasses.replace(TINY, summary="told otherwise", groups={}))
    assert len(runner.Runs.read(plan.out).values) == known > 0
    monkeypatch.setitem(SCENARIOS, TINY.name, dataclasses.replace(TINY, steps=TINY.steps + 1))
    assert not runner.Runs.read(plan.out).values


def test_differences_are_paired_and_corrected(plan: runner.Plan, made: Made) -> None:
    for arm in TINY.arm_names:
        runner._cell(plan, TINY.name, arm)
    runs = runner.Runs.read(plan.out)
    plain, *others = analysis.analyse(runs, TINY)
    assert plain.arm == BASELINE and not plain.differences
    assert [each.arm for each in others] == ["fast", "cagrad", "upgrad"]
    by_seed = {arm: {run["seed"]: run for run in runs.of(TINY.name, arm, SEEDS)} for arm in TINY.arm_names}
    uncorrected = {}
    for each in others:
        assert set(each.differences) == {"mean", "worst language", "low"}
        a, b = ([by_seed[arm][seed]["bits_per_byte"]["ko"] for seed in SEEDS] for arm in (each.arm, BASELINE))
        oracle = stats.ttest_rel(a, b)
        low, high = oracle.confidence_interval(0.95)
        found = each.differences["low"]
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
        uncorrected[each.arm] = oracle.pvalue
    # Holm: the k-th smallest of n times n - k + 1, never below a smaller one's.
    smallest, middle, largest = sorted(uncorrected.values())
    expected = [3 * smallest, max(3 * smallest, 2 * middle), max(3 * smallest, 2 * middle, largest)]
    corrected = sorted(each.differences["low"].p for each in others)
    assert corrected == pytest.approx([min(each, 1.0) for each in expected])


def test_a_run_that_diverges_is_kept_and_not_chosen(plan: runner.Plan, made: Made) -> None:
    assert runner._run(plan, runner.Runs.read(plan.out), TINY, "cagrad", 0, 2.0**7, 0) == math.inf
    assert json.loads(plan.out.read_text())["bits_per_byte"] == dict.fromkeys(LANGUAGES)
    assert runner.Runs.read(plan.out).values
    assert runner._cell(plan, TINY.name, "cagrad").startswith("done, rate 8")


def test_what_the_command_shows(
    plan: runner.Plan, made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arm in TINY.arm_names:
        runner._cell(plan, TINY.name, arm)
    parser = argparse.ArgumentParser()
    study.configure(parser)
    study.run(parser.parse_args(["--out", str(plan.out), "--scenarios", "tiny", "--tables"]))
    shown = capsys.readouterr().out
    clear = next(line for line in shown.splitlines() if line.startswith("| fast (rescale mean) |"))
    told = re.search(r"\*\*(-0\.\d+) ", clear)
    assert told is not None and float(told[1]) == pytest.approx(-0.5, abs=5e-3)  # seven deviations of the noise
    assert plan.out.with_suffix(".png").stat().st_size > 1000
    assert plan.out.with_name("runs-rates.png").stat().st_size > 1000
    nothing = runner.Runs([])
    assert not tables.plot_rates(nothing, plan.out, TINY) and not tables.plot_differences(nothing, plan.out, [TINY])
