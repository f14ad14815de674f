"""`bucketmoo simulate`: rules and granularities on two objectives whose Pareto front is known."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bucketmoo_ds import aggregate
from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.simulate import table
from bucketmoo_ds.apps.simulate.problems import GRANULARITIES, PROBLEMS, RULES, problem_of
from bucketmoo_ds.apps.simulate.run import blocks_of, descend, short
from bucketmoo_ds.errors import ConfigError

FRONT = 30  # points of a front that are written


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--problems", type=_names, default=tuple(PROBLEMS), help=f"of {', '.join(PROBLEMS)}")
    parser.add_argument(
        "--aggregators", type=_names, default=RULES, help=f"comma-separated (default {','.join(RULES)})"
    )
    parser.add_argument("--granularities", type=_names, default=GRANULARITIES, help="comma-separated")
    parser.add_argument("--steps", type=int, help="of each run (default: each problem's own)")
    parser.add_argument("--learning-rate", type=float, help="default: each problem's own")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation, on every element of a gradient")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the noise, and rules that draw")
    parser.add_argument("--out", type=Path, help="folder for simulate.json and a plot of each problem")


def run(options: argparse.Namespace) -> None:
    """Runs all of it, shows the table, and writes the files."""
    for name in options.aggregators:
        try:
            aggregate.create(name)
        except ConfigError as error:
            raise ConfigError(f"--aggregators: {error}") from error
    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: expected at least 1")
    if options.learning_rate is not None and not 0 < options.learning_rate < math.inf:
        raise ConfigError(f"--learning-rate {options.learning_rate}: expected a number above 0")
    if not (0 <= options.noise < math.inf and 0 <= options.seed < 2**31):
        raise ConfigError("--noise and --seed: expected numbers, 0 or more, the seed below 2^31")
    if options.out and importlib.util.find_spec("matplotlib") is None:
        way_out = "pip install 'bucketmoo-ds[train]', in a clone: '.[train]'"
        raise ConfigError(f"--out {options.out}: the plots need matplotlib: {way_out}")
    problems = [problem_of(name, options.seed) for name in options.problems]
    plans = {(each.name, name): blocks_of(each, name) for each in problems for name in options.granularities}
    result: dict[str, Any] = {
        "made_by": provenance.describe(("torch",)),
        "command": shlex.join(["bucketmoo", *sys.argv[1:]]),
        "problems": [
            {
                "name": each.name,
                "summary": each.summary,
                "distance": short(each.distance(each.losses(each.starts))),
                "front": short(each.outline(FRONT)),
            }
            for each in problems
        ],
        "runs": [],
    }
    for problem in problems:
        for granularity in options.granularities:
            plan = plans[problem.name, granularity]
            if plan is None:
                print(f"{problem.name}: refined is model, as both objectives use everything", file=sys.stderr)
                continue
            for rule in options.aggregators:
                found = descend(
                    problem,
                    rule,
                    plan,
                    steps=options.steps,
                    rate=options.learning_rate,
                    noise=options.noise,
                    seed=options.seed,
                )
                result["runs"].append(
                    {"problem": problem.name, "granularity": granularity, "rule": rule} | found.to_json()
                )
    Console(width=None if sys.stdout.isatty() else 160).print(table.to_rich(result))
    print(table.READ)
    if options.out:
        _write(result, options.out)


def _write(result: dict[str, Any], folder: Path) -> None:
    from bucketmoo_ds.apps.simulate.plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(result, separators=(",", ":")).replace('{"problem"', '\n{"problem"')
    (folder / "simulate.json").write_text(lines + "\n", encoding="utf-8")
    print(f"wrote {folder / 'simulate.json'}", file=sys.stderr)
    for problem in result["problems"]:
        path = folder / f"simulate-{problem['name']}.png"
        path.write_bytes(plot(result, problem["name"]))
        print(f"wrote {path}", file=sys.stderr)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
