"""All runs of the study, over processes. Every run is one line of a file; a call goes on where the last one has ended.

A *cell* is an arm of a scenario: first its learning rate and variant are chosen on the tuning seeds, then it is run on
the seeds of the comparison. One process works on a cell at a time.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.study.design import BASE, BASELINE, SCENARIOS, TUNING_SEEDS, Arm, Scenario

_KEY = ("scenario", "arm", "variant", "rate", "seed")
_LONGEST_GRID = 4  # steps of the rate away from the middle


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call is asked for.

    Args:
        out: the file of runs, JSON lines.
        folder: of text and base models.
        cache: of fetched packages.
        seeds: of the comparison.
        until: `time.time()` after which no run begins.
    """

    out: Path
    folder: Path
    cache: Path
    seeds: tuple[int, ...]
    until: float = math.inf


class Runs:
    """The runs of a file, by (scenario, arm, variant, rate, seed), of designs as they are now.

    Args:
        records: its lines: runs, and a head for every call that made some.

    Attributes:
        heads: where the runs were made, see `provenance.describe`.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.values: dict[tuple[str, str, int, float, int], Mapping[str, Any]] = {}
        self.heads: list[dict[str, Any]] = []
        for record in records:
            if "head" in record:
                self.heads.append(record["head"])
            elif _is_current(record):
                self.values[tuple(record[name] for name in _KEY)] = record

    @classmethod
    def read(cls, path: Path) -> Runs:
        """Returns what a file holds, nothing where there is none."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return cls(json.loads(line) for line in text.splitlines())

    def of(self, scenario: str, arm: str, seeds: Iterable[int]) -> list[Mapping[str, Any]]:
        """Returns the runs of a cell on some seeds."""
        wanted = set(seeds)
        return [
            run for (name, of, *_, seed), run in self.values.items() if (name, of) == (scenario, arm) and seed in wanted
        ]


def work(plan: Plan, cells: Sequence[tuple[str, str]], processes: int, say: Callable[[str], object]) -> list[str]:
    """Makes what is missing of some cells (scenario, arm); returns the errors of those that failed."""
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    _append(plan.out, {"head": provenance.describe(("torch", "transformers"))})
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    failed = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(_cell, plan, *cell): cell for cell in cells}
        for done in concurrent.futures.as_completed(waiting):
            scenario, arm = waiting[done]
            try:
                say(f"{scenario}, {arm}: {done.result()}")
            except Exception as error:  # the other cells go on
                failed.append(f"{scenario}, {arm}: {type(error).__name__}: {error}")
                say(failed[-1])
    return failed


def mean(run: Mapping[str, Any]) -> float:
    """The mean of the languages' bits per byte; infinite where one is not finite."""
    values = [math.inf if value is None else value for value in run["bits_per_byte"].values()]
    return statistics.fmean(values)


def _cell(plan: Plan, scenario_name: str, arm_name: str) -> str:
    """Makes the missing runs of a cell, in a process of its own; returns what to tell."""
    scenario = SCENARIOS[scenario_name]
    variants = _variants(scenario.arm(arm_name))
    run = functools.partial(_run, plan, Runs.read(plan.out), scenario, arm_name)
    try:
        if arm_name == BASELINE:
            _run(plan, Runs.read(plan.out), scenario, BASE, 0, 0.0, 0)
        chosen = _tune(scenario, variants, run)
        for seed in plan.seeds:
            run(*chosen, seed)
    except TimeoutError:
        return "not finished"
    variant, rate = chosen
    return f"done, rate {rate:g}" + (f", variant {variant}" if len(variants) > 1 else "")


def _tune(scenario: Scenario, variants: Sequence[Arm], run: Callable[[int, float, int], float]) -> tuple[int, float]:
    """Returns the best (variant, rate): the rate of the first variant, then of the others at that rate."""

    def score(variant: int, exponent: int) -> float:
        rate = scenario.rate * scenario.factor**exponent
        return statistics.fmean(run(variant, rate, seed) for seed in TUNING_SEEDS)

    def best_exponent(variant: int, exponents: Iterable[int]) -> int:
        scores = {exponent: score(variant, exponent) for exponent in exponents}
        while True:
            best = min(scores, key=lambda exponent: scores[exponent])
            ends = {min(scores): min(scores) - 1, max(scores): max(scores) + 1}
            if best not in ends or abs(ends[best]) > _LONGEST_GRID:
                return best
            scores[ends[best]] = score(variant, ends[best])

    exponent = best_exponent(0, (-1, 0, 1))
    variant = min(range(len(variants)), key=lambda each: score(each, exponent))
    if variant:
        exponent = best_exponent(variant, (exponent - 1, exponent, exponent + 1))
    return variant, scenario.rate * scenario.factor**exponent


def _run(plan: Plan, runs: Runs, scenario: Scenario, arm_name: str, variant: int, rate: float, seed: int) -> float:
    """Returns the mean of a run, which is made if it is not there yet."""
    key = (scenario.name, arm_name, variant, rate, seed)
    if key not in runs.values:
        if time.time() > plan.until:
            raise TimeoutError
        arm = scenario.arm(arm_name)
        values = _make(plan, scenario, _variants(arm)[variant], rate, seed)
        bits = {name: value if math.isfinite(value) else None for name, value in values["bits_per_byte"].items()}
        run = dict(zip(_KEY, key, strict=True)) | {"design": scenario.digest(arm)} | values | {"bits_per_byte": bits}
        _append(plan.out, run)
        runs.values[key] = run
    return mean(runs.values[key])


def _make(plan: Plan, scenario: Scenario, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    import torch
    import transformers

    from bucketmoo_ds.apps.study import bases, gemma, text, trial

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bucketmoo_ds").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if scenario.model == "gemma":
        data, base = gemma.load(scenario, plan.folder / "text", plan.cache)
    else:
        data = text.load(scenario, plan.folder / "text", plan.cache)
        base = bases.load(scenario, data, plan.folder / "bases")
    if arm.name == BASE:
        return {"bits_per_byte": trial.measure(base, data, scenario), "seconds": 0.0}
    return trial.run(scenario, arm, rate, seed, data, base)


def _variants(arm: Arm) -> list[Arm]:
    return [arm, *(dataclasses.replace(arm, **dict(changes)) for changes in arm.variants)]


def _is_current(run: Mapping[str, Any]) -> bool:
    scenario = SCENARIOS.get(run["scenario"])
    return (
        scenario is not None
        and run["arm"] in (*scenario.arm_names, BASE)
        and run["design"] == scenario.digest(scenario.arm(run["arm"]))
    )


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line in one write, so that processes can share the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
