"""`bucketmoo`: finds the sub-command, and turns every expected failure into one message and an exit status.

0: done. 1: a run failed. 2: bad usage or a bad setting. 130: interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from bucketmoo_ds import __version__
from bucketmoo_ds.errors import BucketMOOError

# Each module has `configure(parser)` and `run(options)`; none is imported before it is needed.
COMMANDS = {
    "quickstart": "compare averaging with bucket MOO on real text, in minutes",
    "train": "fine-tune a model as a YAML or JSON file says",
    "report": "write the report of a run",
    "study": "compare rules with tuned controls over many small paired runs",
    "plan": "show what a cluster sends and keeps, and which node trains on which language",
    "simulate": "compare rules and granularities where the Pareto front is known",
    "bench": "measure the kernels on this machine",
    "doctor": "show what is installed, what will run, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="bucketmoo", description="Bucket-level MOO of multilingual gradients.")
    parser.add_argument("--version", action="version", version=f"bucketmoo_ds {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            _module(name).configure(command)
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    raise SystemExit(_run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        _module(options.command).run(options)
    except KeyboardInterrupt:
        print("bucketmoo: interrupted; all ranks have ended", file=sys.stderr)
        return 130
    except BucketMOOError as error:
        print(f"bucketmoo: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"bucketmoo: {error}", file=sys.stderr)
        return 1
    return 0


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"bucketmoo_ds.apps.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("bucketmoo_ds"):
            raise
        way_out = "pip install 'bucketmoo-ds[train]', in a clone: '.[train]'"
        print(f"bucketmoo: {name} needs {error.name}: {way_out}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
