"""`bucketmoo report RUN`: `report.html` and the plots of a run, or of a quickstart."""

from __future__ import annotations

import argparse
from pathlib import Path

from bucketmoo_ds.apps.monitor.report import write_report


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("run", type=Path, help="folder with metrics.jsonl, or of a quickstart")


def run(options: argparse.Namespace) -> None:
    """Writes the report."""
    print(write_report(options.run))
