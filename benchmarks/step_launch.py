"""What the step benchmarks share in the process that starts the ranks: options, process sets, the result file."""

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import step_worker
from step_worker import Arm, Settings
from torch import multiprocessing as ranks

from bucketmoo_ds.apps.bench import provenance

ProcessSet = tuple[Settings, list[Arm]]


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that all these benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--world", type=int, nargs="+", default=[2, 4], metavar="W", help="processes (default 2 4)")
    made.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    made.add_argument("--parameters", type=_count, default=20_000_000, metavar="N", help="of the model (default 20M)")
    made.add_argument("--tokens", type=int, default=64, help="of a micro-batch (default 64)")
    made.add_argument("--steps", type=int, default=15, help="measured windows of every arm (default 15)")
    made.add_argument("--threads", type=int, default=1, help="of every process (default 1)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, metavar="FILE", help="where the result goes, as JSON")
    made.add_argument("--render", type=Path, metavar="FILE", help="print the tables of this result instead")
    return made


def run(
    options: argparse.ArgumentParser,
    sets: Callable[[argparse.Namespace], Iterable[ProcessSet]],
    measure: Callable[[Settings, list[Arm]], list[dict[str, Any]]],
    render: Callable[[dict[str, Any]], str],
    preloaded: list[str],
    least_processes: int = 2,
) -> None:
    """Measures as the command line says, and writes and prints what came out.

    Args:
        options: made by `parser`.
        sets: from the options, the process sets: what all arms of it share, and the arms.
        measure: returns one entry per arm.
        render: makes Markdown of a result.
        preloaded: what every rank imports.
        least_processes: with which there is something to measure.
    """
    arguments = options.parse_args()
    if arguments.render:
        print(render(json.loads(arguments.render.read_text(encoding="utf-8"))))
        return
    if min(arguments.world) < least_processes:
        options.error("--world: nothing is exchanged by fewer than 2 processes")
    _prepare_start(arguments.threads, preloaded)
    began = time.monotonic()
    result: dict[str, Any] = provenance.describe() | {"command": _command(options.prog, arguments), "sets": []}
    for settings, arms in sets(arguments):
        described = dataclasses.asdict(settings)
        print(f"{time.monotonic() - began:.0f} s: {described}", flush=True)
        result["sets"].append({"settings": described, "arms": measure(settings, arms)})
    result["seconds"] = round(time.monotonic() - began)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))


def shared(arguments: argparse.Namespace, world_size: int, dtype: str) -> dict[str, Any]:
    """Returns the fields of `Settings` for one world size and dtype."""
    return {
        "world_size": world_size,
        "dtype": dtype,
        "parameters": arguments.parameters,
        "bucket_elements": arguments.parameters // 8,
        "tokens": arguments.tokens,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "seed": arguments.seed,
    }


def step_costs(settings: Settings, arms: list[Arm]) -> list[dict[str, Any]]:
    """Returns one entry per arm: its times, the bytes of every rank, and the peak memory of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        start_ranks(step_worker.measure, settings, arms, out)
        found: list[dict[str, Any]] = json.loads(out.read_text())
        for arm, entry in zip(arms, found, strict=True):
            if arm.aggregator != "mean":  # it holds what mgda holds
                start_ranks(step_worker.measure_memory, settings, arm, out)
                entry["memory"] = json.loads(out.read_text())
    return found


def start_ranks(work: Any, settings: Settings, *what: Any) -> None:
    """Runs `work` on all ranks, each a fork of a server that has imported torch once: a fresh process for every arm
    then costs no start. A rank that fails ends the others and raises here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks.start_processes(work, (port, settings, *what), nprocs=settings.world_size, start_method="forkserver")


def _prepare_start(threads: int, preloaded: list[str]) -> None:
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
    multiprocessing.set_forkserver_preload(preloaded)


def _command(program: str, arguments: argparse.Namespace) -> str:
    """Returns the command line in full, files apart."""
    words = [f"python benchmarks/{program}"]
    for name, value in vars(arguments).items():
        if name not in ("out", "render"):
            words.append(" ".join([f"--{name}", *map(str, [value] if isinstance(value, str | int) else value)]))
    return " ".join(words)


def _count(text: str) -> int:
    """`20M` -> 20,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f'"{text}": expected a number such as 20M, 500k or 1000000')
    return int(float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]])
