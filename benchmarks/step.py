"""What bucket_moo costs per optimizer step, as ratios to plain DeepSpeed in the same run: time, memory, bytes sent.

    python benchmarks/step.py --out benchmarks/results/step-cpu.json    measure, on gloo, and print the tables
    python benchmarks/step.py --render benchmarks/results/step-cpu.json print the tables of an earlier run

Documentation quotes the tables that come out of here; nobody types a number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import step_table
import step_worker
from step_worker import Arm, Settings
from torch import multiprocessing as ranks

from bucketmoo_ds.bench import provenance

# What a rank imports: DeepSpeed, and with Muon's file, which every engine imports, the whole of torch.compile.
PRELOADED = ["step_worker", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.muon.muon_optimizer"]


def main() -> None:
    arguments = _parse()
    if arguments.render:
        print(step_table.render(json.loads(arguments.render.read_text(encoding="utf-8"))))
        return
    _prepare_start(arguments.threads)
    began = time.monotonic()
    result: dict[str, Any] = provenance.describe() | {"command": _command(arguments), "sets": []}
    for world_size in arguments.world:
        for dtype in arguments.dtype:
            settings = Settings(
                world_size=world_size,
                dtype=dtype,
                parameters=arguments.parameters,
                bucket_elements=arguments.parameters // 8,
                tokens=arguments.tokens,
                stage=arguments.stage,
                steps=arguments.steps,
                threads=arguments.threads,
                seed=arguments.seed,
            )
            print(f"{world_size} processes, {dtype}: {time.monotonic() - began:.0f} s", flush=True)
            found = measure(settings, arms_of(world_size, dtype))
            result["sets"].append({"settings": dataclasses.asdict(settings), "arms": found})
    result["seconds"] = round(time.monotonic() - began)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(step_table.render(result))


def arms_of(world_size: int, dtype: str) -> list[Arm]:
    """Returns what is compared: each bucket_moo arm stands after the plain one that it is divided by.

    Rows are float32 whatever the gradients are: what more languages and another aggregator cost, fp32 shows.
    """
    accumulating = [
        Arm(micro_steps=4, aggregator=aggregator, mode="deferred", languages=languages)
        for languages in ((world_size, 2 * world_size) if dtype == "fp32" else (world_size,))
        for aggregator in (("mean", "mgda") if dtype == "fp32" else ("mgda",))
    ]
    return [
        Arm(micro_steps=1),
        *(Arm(micro_steps=1, aggregator="mgda", mode=mode, languages=world_size) for mode in ("streaming", "deferred")),
        Arm(micro_steps=4),
        *accumulating,
    ]


def measure(settings: Settings, arms: list[Arm]) -> list[dict[str, Any]]:
    """Returns one entry per arm: its times, the bytes of every rank, and the peak memory of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        _run_ranks(step_worker.measure, settings, arms, out)
        found: list[dict[str, Any]] = json.loads(out.read_text())
        for arm, entry in zip(arms, found, strict=True):
            if arm.aggregator != "mean":  # it holds what mgda holds
                _run_ranks(step_worker.measure_memory, settings, arm, out)
                entry["memory"] = json.loads(out.read_text())
    return found


def _run_ranks(work: Any, settings: Settings, *what: Any) -> None:
    """Runs `work` on all ranks, each a fork of a server that has imported torch and DeepSpeed once: a fresh process for
    every arm then costs no start. A rank that fails ends the others and raises here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks.start_processes(work, (port, settings, *what), nprocs=settings.world_size, start_method="forkserver")


def _prepare_start(threads: int) -> None:
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "DS_LOG_LEVEL": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers, which would be threads in the fork server
        # The server that the ranks are forked from gets no other path, and would import nothing ahead, silently.
        "PYTHONPATH": os.pathsep.join(path),
    }
    multiprocessing.set_forkserver_preload(PRELOADED)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4], metavar="W", help="processes (default 2 4)")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--parameters", type=_count, default=20_000_000, metavar="N", help="of the model (default 20M)")
    parser.add_argument("--tokens", type=int, default=64, help="of a micro-batch (default 64)")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="ZeRO stage (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed windows of every arm (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result goes, as JSON")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the tables of this result instead")
    arguments = parser.parse_args()
    if min(arguments.world) < 2:
        parser.error("--world: nothing is exchanged by fewer than 2 processes")
    return arguments


def _command(arguments: argparse.Namespace) -> str:
    options = {"world": arguments.world, "dtype": arguments.dtype} | {
        name: [getattr(arguments, name)] for name in ("parameters", "tokens", "stage", "steps", "threads", "seed")
    }
    return "python benchmarks/step.py " + " ".join(f"--{k} {' '.join(map(str, v))}" for k, v in options.items())


def _count(text: str) -> int:
    """`20M` -> 20,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f'"{text}": expected a number such as 20M, 500k or 1000000')
    return int(float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]])


if __name__ == "__main__":
    main()
