"""What bucket_moo costs per optimizer step under torch's wrappers, as ratios to the plain wrapper in the same run.

    python benchmarks/wrappers.py --out benchmarks/results/wrappers-cpu.json    measure, on gloo, and print the tables
    python benchmarks/wrappers.py --render benchmarks/results/wrappers-cpu.json print the tables of an earlier run

Time, memory and bytes are measured as `step.py` measures them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import step_launch
import wrappers_table
from step_worker import Arm
from wrappers_worker import PRELOADED, WRAPPERS, WrapperSettings

from bucketmoo_ds.adapters import table


def main() -> None:
    options = step_launch.parser(__doc__)
    options.add_argument("--wrapper", nargs="+", choices=WRAPPERS, default=list(WRAPPERS), help="default all")
    step_launch.run(options, sets, step_launch.step_costs, wrappers_table.render, PRELOADED)


def sets(arguments: argparse.Namespace) -> Iterable[step_launch.ProcessSet]:
    """Yields the process sets."""
    for wrapper in arguments.wrapper:
        for world_size in arguments.world:
            for dtype in arguments.dtype:
                settings = WrapperSettings(wrapper=wrapper, **step_launch.shared(arguments, world_size, dtype))
                yield settings, arms_of(world_size, dtype, wrapper)


def arms_of(world_size: int, dtype: str, wrapper: str) -> list[Arm]:
    """Returns what is compared: each bucket_moo arm stands after the plain one that it is divided by.

    What the aggregator costs, fp32 shows.
    """
    aggregators = ("mean", "mgda") if dtype == "fp32" else ("mgda",)
    windows = [(1, "streaming", False), (4, "deferred", False)]
    if WRAPPERS[wrapper].exchanged == table.EITHER:
        windows.append((4, "streaming", True))
    return [
        arm
        for micro_steps, mode, once in windows
        for arm in (
            Arm(micro_steps=micro_steps, once_a_window=once),
            *(
                Arm(micro_steps=micro_steps, aggregator=name, mode=mode, languages=world_size, once_a_window=once)
                for name in aggregators
            ),
        )
    ]


if __name__ == "__main__":
    main()
