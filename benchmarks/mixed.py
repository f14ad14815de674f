"""What mode `mixed` costs per optimizer step, as ratios to plain training in the same run: time, memory, bytes sent.

    python benchmarks/mixed.py --out benchmarks/results/mixed-cpu.json    measure, and print the tables
    python benchmarks/mixed.py --render benchmarks/results/mixed-cpu.json print the tables of an earlier run

Time, memory and bytes are measured as `step.py` measures them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mixed_table
import step_launch
import step_worker
from mixed_worker import PRELOADED, MixedArm, MixedSettings
from step_worker import Arm, Settings


def main() -> None:
    options = step_launch.parser(__doc__)
    options.set_defaults(world=[1, 2], dtype=["fp32"])
    options.add_argument("--languages", type=int, nargs="+", default=[2, 4, 8], metavar="K", help="default 2 4 8")
    options.add_argument("--lengths", type=int, nargs="+", default=[64, 512], help="tokens of a micro-batch")
    step_launch.run(options, sets, costs, mixed_table.render, PRELOADED, least_processes=1)


def sets(arguments: argparse.Namespace) -> Iterable[step_launch.ProcessSet]:
    """Yields the process sets."""
    for tokens in arguments.lengths:
        for world_size in arguments.world:
            shared = step_launch.shared(arguments, world_size, "fp32") | {"tokens": tokens}
            mixed = [
                MixedArm(micro_steps=1, aggregator="cagrad", mode="mixed", languages=languages, grams=grams)
                for languages in arguments.languages
                for grams in (False, True)
            ]
            yield MixedSettings(**shared), [MixedArm(micro_steps=1), *mixed]


def costs(settings: Settings, arms: list[Arm]) -> list[dict[str, Any]]:
    """Returns one entry per arm. Memory is that of windows with Grams, which need most."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        step_launch.start_ranks(step_worker.measure, settings, arms, out)
        found: list[dict[str, Any]] = json.loads(out.read_text())
        for arm, entry in zip(arms, found, strict=True):
            if arm.aggregator is None or arm.grams:
                step_launch.start_ranks(step_worker.measure_memory, settings, arm, out)
                entry["memory"] = json.loads(out.read_text())
    return found


if __name__ == "__main__":
    main()
