"""What runs at the same time while FSDP2, FSDP1 or DDP trains with bucket_moo, from torch.profiler, on the CPU.

    python benchmarks/overlap.py --out benchmarks/results/overlap-cpu.json       measure, on gloo, and print the tables
    python benchmarks/overlap.py --render benchmarks/results/overlap-cpu.json    print the tables of an earlier run

How much of the rows' exchange lies inside backward's own work, and what the tail after the last bucket is made of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import overlap_table
import overlap_worker
import step_launch
from step_worker import Arm, Settings
from wrappers_worker import PRELOADED, WRAPPERS, WrapperSettings


def main() -> None:
    options = step_launch.parser(__doc__)
    options.add_argument("--wrapper", nargs="+", choices=WRAPPERS, default=["fsdp2"], help="default fsdp2")
    options.set_defaults(world=[2], dtype=["fp32"])
    step_launch.run(options, sets, measure, overlap_table.render, [*PRELOADED, "overlap_worker"])


def sets(arguments: argparse.Namespace) -> Iterable[step_launch.ProcessSet]:
    """Yields the process sets: a streaming arm and a deferred one."""
    for wrapper in arguments.wrapper:
        for world_size in arguments.world:
            for dtype in arguments.dtype:
                yield WrapperSettings(wrapper=wrapper, **step_launch.shared(arguments, world_size, dtype)), [
                    Arm(micro_steps=1, aggregator="mgda", mode="streaming", languages=world_size),
                    Arm(micro_steps=4, aggregator="mgda", mode="deferred", languages=world_size),
                ]


def measure(settings: Settings, arms: list[Arm]) -> list[dict[str, Any]]:
    """Returns one entry per arm: its profiled windows, of all ranks."""
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        for arm in arms:
            step_launch.start_ranks(overlap_worker.measure, settings, arm, out)
            entries.append({"arm": {"name": arm.name}} | json.loads(out.read_text()))
    return entries


if __name__ == "__main__":
    main()
