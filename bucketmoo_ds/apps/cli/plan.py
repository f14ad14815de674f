"""`bucketmoo plan`: which exchange fits a cluster, what each node trains on, and what is sent and kept for it."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from bucketmoo_ds.adapters import table
from bucketmoo_ds.apps.planner import Forecast, Setup, Traffic, forecast
from bucketmoo_ds.errors import ConfigError

SHOWN_NODES = 16
SHOWN_STEPS = 8
UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}

READ = "On average; 1 GB = 10^9 bytes. Reduce-scatters, all-gathers and all-reduces count as rings in rank order."
AT_MOST = "The combined gradient counts as the most that ZeRO-1/2 may have to send."
PATTERN = "A pattern: the sampler draws the places anew for every window and fits the shares to the languages' sizes."


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments. Values are read in `run`, where a bad one costs one line."""
    parser.add_argument("--world-size", "--world", required=True, metavar="W", help="ranks")
    parser.add_argument("--ranks-per-node", "--per-node", required=True, metavar="L", help="ranks of a node")
    parser.add_argument("--languages", required=True, metavar="K", help="how many")
    parser.add_argument("--micro-steps", default="1", metavar="M", help="of a window (gradient accumulation steps)")
    parser.add_argument("--once-a-window", action="store_true", help="exchange gradients once a window")
    parser.add_argument("--parameters", default="1B", metavar="P", help="trainable, such as 20M or 8B (default 1B)")
    parser.add_argument("--dtype", default="fp32", help="of gradients on the wire: fp32 (default) or bf16")
    parser.add_argument("--framework", default="fsdp2", help=f"{', '.join(table.names())} (default fsdp2)")
    parser.add_argument("--stage", help="of ZeRO, with --framework deepspeed: 0 to 3")
    parser.add_argument("--replicas", default="1", metavar="R", help="of the model, with --framework fsdp2 (HSDP)")
    parser.add_argument("--buckets", default="32", help="that the gradient is reduced in (default 32)")
    parser.add_argument("--blocks", help="that it is resolved in (default: one a bucket)")
    parser.add_argument("--exchange", default="auto", help="auto (default), flat or two_stage")
    parser.add_argument("--gram", default="plain", help="plain (default) or cross: two rows a language")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> None:
    """Forecasts, and prints what was found."""
    found = forecast(
        Setup(
            world_size=_whole("--world-size", options.world_size),
            ranks_per_node=_whole("--ranks-per-node", options.ranks_per_node),
            languages=_whole("--languages", options.languages),
            parameters=_whole("--parameters", options.parameters),
            micro_steps=_whole("--micro-steps", options.micro_steps),
            once_a_window=options.once_a_window,
            dtype=options.dtype,
            framework=options.framework,
            stage=None if options.stage is None else _whole("--stage", options.stage),
            replicas=_whole("--replicas", options.replicas),
            buckets=_whole("--buckets", options.buckets),
            blocks=0 if options.blocks is None else _whole("--blocks", options.blocks),
            exchange=options.exchange,
            gram=options.gram,
        )
    )
    if found.setup.framework == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        way_out = 'pip install "bucketmoo-ds[deepspeed]"'
        print(f"WARNING: DeepSpeed is not installed here, and a run needs it: {way_out}", file=sys.stderr)
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
        return
    # A pipe or file gets whole lines, not 80 columns of them.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in _parts(found):
        console.print(part, markup=False)


def _parts(found: Forecast) -> Iterator[str | Table]:
    setup = found.setup
    yield _headline(setup)
    yield f"exchange: {found.exchange} ({found.reason})"
    yield "\nThe languages of each node in the first window:"
    yield _layout_table(found)
    cut = [f"{SHOWN_NODES} of {setup.nodes} nodes"] * (setup.nodes > SHOWN_NODES)
    cut += [f"{SHOWN_STEPS} of {setup.exchanges} micro-steps"] * (setup.exchanges > SHOWN_STEPS)
    if cut:
        yield f"{' and '.join(cut)}; --json has all."
    yield PATTERN
    yield "\nBytes that a rank sends in one window:"
    yield _traffic_table(found)
    yield READ
    if setup.adapter.combined == "owners":
        yield AT_MOST
    yield f"\nMemory of the rows on a rank{', two a language (gram: cross)' * (setup.gram == 'cross')}:"
    yield _memory_table(found)
    yield ""
    yield from (f"WARNING: {text}" for text in found.warnings)
    yield from _settings(found)


def _headline(setup: Setup) -> str:
    replicas = f", {setup.replicas} replicas" if setup.replicas > 1 else ""
    once = ", exchanged once a window" if setup.exchanges < setup.micro_steps else ""
    return (
        f"{setup.world_size} ranks, {setup.ranks_per_node} a node; languages: {setup.languages}; micro-steps a window: "
        f"{setup.micro_steps}{once}; {setup.adapter.title}{replicas}, {_short(setup.parameters)} parameters, "
        f"{setup.dtype}"
    )


def _layout_table(found: Forecast) -> Table:
    setup, layout = found.setup, found.layout()
    shown = min(setup.exchanges, SHOWN_STEPS)
    every_step = setup.exchanges < setup.micro_steps
    table = Table("node", "ranks", *(["all micro-steps"] if every_step else [f"step {step}" for step in range(shown)]))
    per_node = len(layout[0]) // setup.nodes
    for node in range(min(setup.nodes, SHOWN_NODES)):
        first = node * setup.ranks_per_node
        ranks = _runs(range(first, first + setup.ranks_per_node))
        places = slice(node * per_node, (node + 1) * per_node)
        table.add_row(str(node), ranks, *(_runs(row[places]) for row in layout[:shown]))
    return table


def _traffic_table(found: Forecast) -> Table:
    head = ("exchange", "languages", "gradients", "combined", "Grams", "in all", "x plain", "between nodes", "x plain")
    table = Table(*head)
    table.add_row(f"plain {_plain_name(found.setup)}".rstrip(), "", *_traffic_cells(found.plain, found.plain))
    for name, traffic in {"flat": found.flat, "two_stage": found.two_stage}.items():
        if traffic is not None:
            covered = str(min(found.setup.languages, found.setup.places(name)))
            table.add_row(name + " *" * (name == found.exchange), covered, *_traffic_cells(traffic, found.plain))
    return table


def _traffic_cells(traffic: Traffic, plain: Traffic) -> list[str]:
    parts = [decimal(part.total) if part.total else "" for part in (traffic.combined, traffic.grams)]
    return [
        decimal(traffic.gradients.total),
        *parts,
        decimal(traffic.sum.total),
        _ratio(traffic.sum.total, plain.sum.total),
        decimal(traffic.sum.between_nodes),
        _ratio(traffic.sum.between_nodes, plain.sum.between_nodes),
    ]


def _plain_name(setup: Setup) -> str:
    return setup.adapter.plain + ", all-reduce" * (setup.replicas > 1)


def _memory_table(found: Forecast) -> Table:
    table = Table("row_storage", "device", "host")
    for storage, memory in found.memory.items():
        name = "none (mode: streaming)" if storage == "streaming" else storage
        table.add_row(name, decimal(memory.device), decimal(memory.host) if memory.host else "")
    return table


def _settings(found: Forecast) -> Iterator[str]:
    setup = found.setup
    section: dict[str, Any] = {"exchange": found.exchange} | ({"gram": "cross"} if setup.gram == "cross" else {})
    arguments = ['affinity="window"'] if setup.exchanges < setup.micro_steps else []
    if found.exchange == "two_stage":
        section["ranks_per_node"] = setup.ranks_per_node
        arguments = [f"ranks_per_node={setup.ranks_per_node}", *arguments]
    yield f"in the bucket_moo section: {json.dumps(section)[1:-1]}"
    if arguments:
        yield f"for the sampler: LanguageBatchSampler(..., {', '.join(arguments)})"


def _runs(numbers: Sequence[int]) -> str:
    """0, 1, 2, 3, 0, 1 -> `0-3 0-1`."""
    texts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        texts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return " ".join(texts)


def _ratio(ours: int, plain: int) -> str:
    return f"{ours / plain:.2f}" if plain else ""


def _short(number: int) -> str:
    unit = next((unit for unit in ("B", "M", "k") if number >= UNITS[unit]), "")
    return f"{number / UNITS[unit]:.4g}{unit}"


def _whole(option: str, text: str) -> int:
    """`8B` -> 8,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    number = Fraction(match[1]) * UNITS[match[2]] if match else Fraction(1, 2)
    if number.denominator > 1:
        raise ConfigError(f'{option} "{text}": expected a whole number, such as 64, 20M or 8B')
    return int(number)
