"""What bucket_moo costs per optimizer step, as ratios to plain DeepSpeed in the same run: time, memory, bytes sent.

    python benchmarks/step.py --out benchmarks/results/step-cpu.json    measure, on gloo, and print the tables
    python benchmarks/step.py --render benchmarks/results/step-cpu.json print the tables of an earlier run

Documentation quotes the tables that come out of here; nobody types a number.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import step_launch
import step_table
from step_deepspeed import ZeroSettings
from step_worker import Arm

from bucketmoo_ds.adapters import table

# What a rank imports: DeepSpeed, and with Muon's file, which every engine imports, the whole of torch.compile.
PRELOADED = [
    "step_deepspeed",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


STAGES = [each.stage for each in table.FRAMEWORKS if each.stage is not None]


def main() -> None:
    options = step_launch.parser(__doc__)
    options.add_argument("--stage", type=int, choices=STAGES, default=2, help="ZeRO stage (default 2)")
    step_launch.run(options, sets, step_launch.step_costs, step_table.render, PRELOADED)


def sets(arguments: argparse.Namespace) -> Iterable[step_launch.ProcessSet]:
    """Yields the process sets."""
    for world_size in arguments.world:
        for dtype in arguments.dtype:
            settings = ZeroSettings(stage=arguments.stage, **step_launch.shared(arguments, world_size, dtype))
            yield settings, arms_of(world_size, dtype, arguments.stage)


def arms_of(world_size: int, dtype: str, stage: int) -> list[Arm]:
    """Returns what is compared: each bucket_moo arm stands after the plain one that it is divided by.

    Rows are float32 whatever the gradients are: what more languages and another aggregator cost, fp32 shows. On ZeRO-0
    and 1, which exchange once a window, a rank keeps its language, so that there are no more of them than ranks.
    """
    once = stage < 2
    accumulating = [
        Arm(micro_steps=4, aggregator=aggregator, mode="streaming" if once else "deferred", languages=languages)
        for languages in ((world_size, 2 * world_size) if dtype == "fp32" and not once else (world_size,))
        for aggregator in (("mean", "mgda") if dtype == "fp32" else ("mgda",))
    ]
    return [
        Arm(micro_steps=1),
        *(Arm(micro_steps=1, aggregator="mgda", mode=mode, languages=world_size) for mode in ("streaming", "deferred")),
        Arm(micro_steps=4),
        *accumulating,
    ]


if __name__ == "__main__":
    main()
