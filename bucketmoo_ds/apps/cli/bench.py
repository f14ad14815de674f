"""`bucketmoo bench kernels`: how fast the ops are here, against a large copy, torch and TorchJD."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from bucketmoo_ds import ops
from bucketmoo_ds.apps.bench import cases, provenance, table
from bucketmoo_ds.apps.bench.sweep import sweep, threads
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of
from bucketmoo_ds.ops.backends.checks import MAX_ROWS

REFERENCE = "reference"  # torch in chunked float64, to be read: measured where nothing else runs, or where it is named
PACKAGES = ("torch", "triton", "torchjd")
SECONDS = {"short": 40.0, "full": 1800.0}
REPEATS = {"short": 20, "full": 50}

_Value = TypeVar("_Value")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments. Values are read in `run`, where a bad one costs one line."""
    parser.add_argument("what", metavar="kernels", help="what is measured")
    parser.add_argument("--full", action="store_true", help="every K, S and dtype, in at most half an hour")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(cases.OPS)}")
    parser.add_argument("--backends", help="comma-separated (default: all fast ones that run here, or the reference)")
    parser.add_argument("--dtypes", help=f"of rows, comma-separated, of {', '.join(cases.DTYPES)}")
    parser.add_argument("--languages", metavar="K", help="numbers of rows, comma-separated")
    parser.add_argument("--numel", metavar="S", help="elements of a row, comma-separated, such as 1M,10M")
    parser.add_argument("--segment", help='elements of a segment, comma-separated; "whole" is one segment')
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", help="of the CPU (default: as many as torch takes)")
    parser.add_argument("--repeats", help="the most times that anything is timed")
    parser.add_argument("--seconds", help="after which nothing new is begun (default 40, with --full 1800)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for kernels-cpu.csv, .json and .png")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output instead of the table")


def run(options: argparse.Namespace) -> None:
    """Measures, and prints or writes what was found."""
    if options.what != "kernels":
        raise ConfigError(f'bench "{options.what}": unknown, expected "kernels"')
    if options.output and importlib.util.find_spec("matplotlib") is None:
        way_out = "pip install 'bucketmoo-ds[train]', in a clone: '.[train]'"
        raise ConfigError(f"--output {options.output}: the plot needs matplotlib: {way_out}")
    size = "full" if options.full else "short"
    device = _device(options.device)
    planned = cases.plan(
        full=options.full,
        device=device,
        ops=_names("--ops", options.ops, cases.OPS) or cases.OPS,
        dtypes=_names("--dtypes", options.dtypes, tuple(cases.DTYPES)),
        languages=_values("--languages", options.languages, _between(1, MAX_ROWS)),
        elements=_values("--numel", options.numel, _elements),
        segments=_values("--segment", options.segment, _segment),
    )
    backends, left_out = _backends(options.backends, device)
    count = _value("--threads", options.threads, _between(1, os.cpu_count() or 1), torch.get_num_threads())
    repeats = _value("--repeats", options.repeats, _between(1, 100_000), REPEATS[size])
    seconds = _value("--seconds", options.seconds, _seconds, SECONDS[size])
    head: dict[str, Any] = provenance.describe(PACKAGES) | {
        "command": shlex.join(["bucketmoo", *sys.argv[1:]]),
        "device": device.type,
        "threads": count,
        "left_out": left_out,
    }
    for sentence in left_out:
        _say(f"left out {sentence}")
    with threads(count):
        found = sweep(
            planned, backends, device, repeats=repeats, seconds=seconds, compiled=options.full, say=_say
        )
    if not found.lines:
        raise ConfigError(f"nothing was measured: {found.skipped[0]}")
    result = head | found.as_json()
    if options.output:
        _write(result, options.output)
    if options.json:
        from bucketmoo_ds.apps.bench.files import to_json

        sys.stdout.write(to_json(result))
    else:
        # A pipe or file gets whole lines, not 80 columns of them.
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        console.print(table.origin(result), table.to_rich(result["lines"]), table.READ, sep="\n", markup=False)


def _write(result: dict[str, Any], folder: Path) -> None:
    from bucketmoo_ds.apps.bench.files import write

    for path in write(result, folder):
        _say(f"wrote {path}")


def _backends(given: str | None, device: torch.device) -> tuple[list[str], list[str]]:
    """Returns the backends to measure: those that were named, all of which must run; else those that do. With them one
    sentence for each backend that was left out."""
    if os.environ.get(ops.ENVIRONMENT):
        # Every op runs on that one, whatever it is asked for.
        forced = _runnable("auto", device)
        if given and given != forced:
            raise ConfigError(f'--backends "{given}": {ops.ENVIRONMENT} = "{forced}" overrides it; unset that')
        return [forced], []
    if given:
        return [_runnable(name, device) for name in _names("--backends", given, ops.BACKENDS)], []
    found, left_out = [], []
    for name in ops.BACKENDS:
        if name == REFERENCE:
            continue
        try:
            found.append(_runnable(name, device))
        except ConfigError as error:
            # The setting that the error names is not what was set here.
            reason = str(error).removeprefix(f'bucket_moo.backend = "{name}": ')
            left_out.append(f"{name}: {reason}")
    if not found:
        return [REFERENCE], left_out
    return found, [*left_out, f"{REFERENCE}: it is there to be read; --backends {REFERENCE} measures it"]


def _runnable(name: str, device: torch.device) -> str:
    chosen = ops.choose_backend(name, device)
    if chosen == "triton" and device.type == "cpu":
        raise ConfigError("Triton's interpreter, the only way it runs on a CPU, is not measured: its times say nothing")
    return chosen


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f'--device "{name}": expected "cpu" or "cuda"')
    if name == "cuda" and not there:
        raise ConfigError('--device "cuda": torch finds no CUDA device; leave it out, or give "cpu"')
    return torch.device(name)


def _names(option: str, text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    def read(word: str) -> str:
        if word not in known:
            raise ValueError(f"unknown, expected {one_of(known)}{did_you_mean(word, known)}")
        return word

    return _values(option, text, read)


def _values(option: str, text: str | None, read: Callable[[str], _Value]) -> tuple[_Value, ...]:
    """Reads a comma-separated list, each value once; nothing where the option was not given."""
    if text is None:
        return ()
    found = dict.fromkeys(_value(option, word.strip(), read) for word in text.split(",") if word.strip())
    if not found:
        raise ConfigError(f'{option} "{text}": expected at least one value')
    return tuple(found)


def _value(option: str, text: str | None, read: Callable[[str], _Value], default: _Value | None = None) -> _Value:
    if text is None:
        assert default is not None
        return default
    try:
        return read(text)
    except ValueError as error:
        raise ConfigError(f'{option} "{text}": {error}') from None


def _between(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not least <= int(text) <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return int(text)

    return read


def _elements(text: str) -> int:
    """`10M` -> 10,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    number = float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]] if match else 0.0
    if number < 1 or number != int(number):
        raise ValueError("expected a number such as 10M, 500k or 1000000")
    return int(number)


def _segment(text: str) -> int:
    if text == "whole":
        return cases.WHOLE
    try:
        return _elements(text)
    except ValueError:
        raise ValueError('expected "whole", or a number such as 4096 or 10k') from None


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) <= 0:
        raise ValueError("expected a number of seconds above 0")
    return float(text)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
