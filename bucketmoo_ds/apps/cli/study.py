"""`bucketmoo study`: does a rule help, whom, and when? Makes the runs of `apps/study/design.py`, and tables."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from bucketmoo_ds.apps.study import runner, tables
from bucketmoo_ds.apps.study.design import SCENARIOS, SEEDS, Scenario
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study/runs.jsonl"), help="file of runs; it is gone on with"
    )
    parser.add_argument("--scenarios", type=_names, default=tuple(SCENARIOS), help="comma-separated; all by default")
    parser.add_argument("--arms", type=_names, help="comma-separated; all of a scenario by default")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="paired runs of every arm")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run begins")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="text and base models")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bucketmoo_ds", help="fetched packages")
    parser.add_argument("--tables", action="store_true", help="make no run, only show what the file holds")


def run(options: argparse.Namespace) -> None:
    """Makes the missing runs, and shows the tables."""
    scenarios = [_scenario(name) for name in options.scenarios]
    if min(options.seeds, options.processes) < 1:
        raise ConfigError("--seeds and --processes: expected at least 1")
    if not options.tables:
        plan = runner.Plan(
            options.out, options.folder, options.cache, tuple(range(options.seeds)), time.time() + 60 * options.minutes
        )
        cells = [
            (each.name, arm) for each in scenarios for arm in each.arm_names if not options.arms or arm in options.arms
        ]
        began = time.monotonic()
        failed = runner.work(
            plan, cells, options.processes, lambda text: print(f"{time.monotonic() - began:.0f} s: {text}")
        )
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(cells)} cells failed; the file keeps the others' runs")
    runs = runner.Runs.read(options.out)
    print(tables.markdown(runs, scenarios))
    differences, rates = options.out.with_suffix(".png"), options.out.with_name(f"{options.out.stem}-rates.png")
    if tables.plot_differences(runs, differences, scenarios):
        print(f"\nplot: {differences}")
    if tables.plot_rates(runs, rates, scenarios[0]):
        print(f"plot: {rates}")


def _scenario(name: str) -> Scenario:
    if name not in SCENARIOS:
        raise ConfigError(f'--scenarios: "{name}": expected {one_of(SCENARIOS)}{did_you_mean(name, SCENARIOS)}')
    return SCENARIOS[name]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
