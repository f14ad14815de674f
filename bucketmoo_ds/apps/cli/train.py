"""`bucketmoo train CONFIG`: one run, on the ranks that it starts itself or that torchrun or DeepSpeed started."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bucketmoo_ds.apps.training.folder import check_free
from bucketmoo_ds.apps.training.launch import already_launched, launch
from bucketmoo_ds.apps.training.settings import read_settings
from bucketmoo_ds.errors import ConfigError

WORKER = "bucketmoo_ds.apps.training.worker"
SAVING = 600.0  # seconds that ranks get for the rest of their window and a checkpoint, with save_on_signal


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("config", type=Path, help="YAML or JSON; configs/train.yaml is a commented example")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the output folder")


def run(options: argparse.Namespace) -> None:
    """Checks the settings, trains, and writes the report."""
    settings = read_settings(options.config)
    output = Path(settings.output)
    if (output / "metrics.jsonl").exists() and not options.resume:
        raise ConfigError(f"output = {settings.output!r}: holds a run already; add --resume, or name another folder")
    words = [str(options.config), *(["--resume"] if options.resume else [])]
    if already_launched():
        from bucketmoo_ds.apps.training import worker

        worker.main(words)
        return
    check_free(output)
    threads = max((os.cpu_count() or 1) // settings.processes, 1)
    patience = SAVING if settings.training.save_on_signal else 30.0
    try:
        launch(WORKER, words, settings.processes, output / "logs", threads, patience)
    except KeyboardInterrupt:
        tag = output / "checkpoints" / "latest"
        saved = f"latest checkpoint: {tag.read_text().strip()}" if tag.exists() else "no checkpoint was saved yet"
        print(f"\n{saved}; go on with: bucketmoo train {options.config} --resume")
        raise
    from bucketmoo_ds.apps.monitor.report import write_report

    print(f"report: {write_report(output)}")
