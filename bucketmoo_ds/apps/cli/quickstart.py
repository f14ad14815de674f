"""`bucketmoo quickstart`: real text, a base model, averaging against bucket MOO, a table and a report."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from bucketmoo_ds import aggregate
from bucketmoo_ds.apps.corpus import sources
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable
from bucketmoo_ds.apps.monitor.comparison import compare
from bucketmoo_ds.apps.monitor.report import write_report
from bucketmoo_ds.apps.monitor.tables import to_rich
from bucketmoo_ds.apps.quickstart.prepare import prepare
from bucketmoo_ds.apps.quickstart.settings import BASELINE, QuickstartSettings
from bucketmoo_ds.apps.training.launch import launch
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.plan.blocks import label_of

WORKER = "bucketmoo_ds.apps.quickstart.worker"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    defaults = QuickstartSettings(seen=sources.SEEN_LANGUAGES, unseen=sources.UNSEEN_LANGUAGES)
    parser.add_argument("--data", type=Path, help="folder of text by language, instead of the fetched one")
    parser.add_argument("--base", default=defaults.base, help="language of the base model")
    parser.add_argument("--languages", type=_names, default=defaults.seen, help="seen languages, comma-separated")
    parser.add_argument("--unseen", type=_names, default=defaults.unseen, help="languages for evaluation only")
    parser.add_argument("--aggregators", type=_names, default=defaults.methods[1:], help="compared with averaging")
    parser.add_argument("--seeds", type=int, default=len(defaults.seeds), help="paired runs of every method")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of each fine-tuning")
    parser.add_argument("--base-steps", type=int, default=defaults.base_steps, help="of the English base")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--mode", choices=("exact", "mixed"), default=defaults.mode, help="of micro-batches")
    parser.add_argument("--granularity", help=f"default {defaults.granularity}, in mode mixed layer")
    parser.add_argument("--processes", type=int, default=defaults.processes)
    parser.add_argument("--out", type=Path, help="folder of the results (default: a new one below runs/)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bucketmoo_ds", help="fetched text")


def run(options: argparse.Namespace) -> None:
    """Prepares the data, starts the ranks, and shows the table."""
    began = time.monotonic()
    for name in options.aggregators:
        try:
            aggregate.create(name)
        except ConfigError as error:
            raise ConfigError(f"--aggregators: {error}") from error
    # What is reduced in one go is the framework's business in mode mixed.
    granularity = options.granularity or ("layer" if options.mode == "mixed" else QuickstartSettings.granularity)
    label_of(granularity)
    if min(options.seeds, options.steps, options.base_steps, options.processes) < 1:
        raise ConfigError("--seeds, --steps, --base-steps and --processes: expected at least 1")
    quickstart = QuickstartSettings(
        base=options.base,
        seen=tuple(options.languages),
        unseen=tuple(options.unseen),
        methods=(BASELINE, *options.aggregators),
        seeds=tuple(range(options.seeds)),
        steps=options.steps,
        base_steps=options.base_steps,
        learning_rate=options.learning_rate,
        mode=options.mode,
        granularity=granularity,
        processes=options.processes,
    )
    folder: Path = options.out or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    if (folder / "settings.json").exists():
        raise ConfigError(f"--out {folder}: holds a quickstart already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    quickstart.save(folder)
    (folder / "command.txt").write_text(shlex.join(["bucketmoo", *sys.argv[1:]]) + "\n", encoding="utf-8")
    console = Console()
    console.print("Preparing text ...")
    try:
        corpus = prepare(quickstart, options.data, options.cache, folder)
    except CorpusUnavailable as error:
        raise ConfigError(str(error)) from error
    sizes = ", ".join(f"{name} {size / 1000:.0f} kB" for name, size in corpus["training_bytes"].items())
    console.print(f"Text: {corpus['source']} {corpus['version']} ({corpus['licence']}). {sizes}")
    runs = len(quickstart.methods) * len(quickstart.seeds)
    processes = quickstart.processes
    console.print(f"Training a base ({quickstart.base}), then {runs} runs on {processes} processes, ZeRO-2 ...")
    threads = max((os.cpu_count() or 1) // processes, 1)
    launch(WORKER, [str(folder)], processes, folder / "logs", threads)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    report = write_report(folder)
    console.print(to_rich(compare(results)))
    console.print(f"Report: {report}   ({time.monotonic() - began:.0f} s in all)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
