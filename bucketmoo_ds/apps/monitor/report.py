"""`write_report`: turns the folder of a training run, or of a comparison, into one self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from bucketmoo_ds.aggregate.conflict import conflicts
from bucketmoo_ds.apps.monitor import plots
from bucketmoo_ds.apps.monitor.comparison import compare
from bucketmoo_ds.apps.monitor.history import Curve, History, load
from bucketmoo_ds.apps.monitor.reader import read_json
from bucketmoo_ds.apps.monitor.tables import Table, tables

METRICS = "metrics.jsonl"
RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the page: `png` is its file as base64."""

    title: str
    file: str
    png: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: words, then the table, then the plots; any of them may be missing."""

    title: str
    words: tuple[str, ...] = ()
    table: Table | None = None
    plots: tuple[Plot, ...] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """What the template shows. `facts` are pairs of a name and a value, `texts` are shown folded and verbatim."""

    title: str
    warnings: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    texts: tuple[tuple[str, str], ...]


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html`, and its plots under `plots/`, into a folder.

    Args:
        run_dir: a comparison (`results.json`, and `runs/<method>-seed<k>/metrics.jsonl` for curves) or a training run
            (`metrics.jsonl`, optionally `config.json` and `command.txt`). Parts that are missing are left out, and
            the page says what is missing.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder holds neither.
        OSError: a file cannot be read or written.
        MetricsError: a file does not hold what it should; the message names it.
    """
    run_dir = Path(run_dir)
    if (run_dir / RESULTS).is_file():
        page = _comparison_page(run_dir)
    elif (run_dir / METRICS).is_file():
        page = _run_page(run_dir)
    else:
        raise FileNotFoundError(
            f"{run_dir}: no report without {RESULTS} (a comparison) or {METRICS} (a training run) in this folder"
        )
    source = importlib.resources.files("bucketmoo_ds.apps.monitor").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    target = run_dir / "report.html"
    target.write_text(environment.from_string(source).render(page=page), encoding="utf-8")
    return target


def _run_page(run_dir: Path) -> Page:
    run = load(run_dir / METRICS)
    info = run.info
    title = f"{info['aggregator']} on {len(run.languages)} languages" if info is not None else run_dir.name
    folder = run_dir / "plots"
    charts = _stored(
        folder,
        {
            "bits_per_byte": plots.language_curves(
                {name: run.bits_per_byte(name) for name in run.evaluated}, "Held-out bits per byte", "bits per byte"
            ),
            "loss": plots.language_curves(
                {name: run.loss(name) for name in run.languages}, "Training loss", "nats per target token"
            ),
            **_conflict_charts(run),
        },
    )
    return Page(
        title=f"Training run: {title}",
        warnings=_run_warnings(run),
        facts=_run_facts(run),
        sections=(
            Section("Languages", table=_language_table(run), plots=_chosen(charts, "bits_per_byte", "loss")),
            *_conflict_sections(run, charts),
        ),
        texts=_texts(run_dir, info or {}),
    )


def _conflict_charts(run: History) -> dict[str, bytes | None]:
    steps, weights = run.weights()
    return {
        "cosine": plots.cosine_heatmap(run.cosine, run.languages, run.blocks),
        "weights": plots.weights_over_time(steps, weights, run.languages, run.blocks),
    }


def _run_warnings(run: History) -> tuple[str, ...]:
    found = []
    if not run.steps:
        found.append("There is no step in the metrics file.")
    if run.end is None:
        found.append("The metrics file has no end: the run was killed, or is still going.")
    if not run.evals:
        found.append("No evaluation was written; only training losses are shown.")
    skipped = sum(step["skipped"] for step in run.steps)
    if skipped:
        found.append(f"The optimizer skipped {skipped} of the steps that were written.")
    blamed = [str(language) for step in run.steps for language, _ in step["nonfinite"]]
    if blamed:
        counts = ", ".join(f"{name} ({blamed.count(name)})" for name in sorted(set(blamed)))
        found.append(f"Gradients that were not finite, in language and number of buckets: {counts}.")
    frozen = sum(any(step.get("near_zero") or ()) for step in run.steps)
    if frozen:
        found.append(f"In {frozen} of the detailed steps a language had a nearly zero row in some block.")
    return tuple(found)


def _run_facts(run: History) -> tuple[tuple[str, str], ...]:
    facts: list[tuple[str, str]] = []
    if run.info is not None:
        facts += [("aggregator", run.info["aggregator"]), ("granularity", run.info["granularity"])]
        facts += [("mode", run.info["mode"])]
        facts += [("ranks", str(run.info["world_size"])), ("micro-steps a window", str(run.info["micro_steps"]))]
        facts += [("blocks", str(len(run.info["blocks"]))), ("started", run.info["time"])]
    if run.steps:
        seconds = run.end["seconds"] if run.end is not None else sum(step["seconds"] for step in run.steps)
        tokens = sum(step["tokens"] for step in run.steps)
        facts += [("optimizer steps", f"{run.steps[-1]['step']:,}"), ("tokens", f"{tokens:,}")]
        facts += [("time", _duration(seconds))]
        training = sum(step["seconds"] for step in run.steps)
        if training > 0:
            facts.append(("tokens a second of training", f"{tokens / training:,.0f}"))
        facts.append(("skipped steps", str(sum(step["skipped"] for step in run.steps))))
        facts.append(("rows not finite", str(sum(len(step["nonfinite"]) for step in run.steps))))
    if run.end is not None:
        facts += [(name, f"{value:,}") for name, value in run.end.get("counters", {}).items()]
    return tuple(facts)


def _language_table(run: History) -> Table:
    rows = []
    for name in dict.fromkeys((*run.languages, *run.evaluated)):
        loss, bits = run.loss(name), run.bits_per_byte(name)
        tokens = sum(step["language_tokens"].get(name, 0) for step in run.steps)
        rows.append((name, f"{tokens:,}", _end(loss, 0), _end(loss, -1), _end(bits, 0), _end(bits, -1)))
    finals = [curve.values[-1] for name in run.evaluated if (curve := run.bits_per_byte(name)).steps.size]
    if finals:
        rows.append(("mean", "", "", "", "", f"{sum(finals) / len(finals):.3f}"))
    return Table(
        title="Languages",
        header=("language", "tokens", "first loss", "last loss", "first bits per byte", "last bits per byte"),
        rows=tuple(rows),
        best=frozenset(),
        notes=("Losses are of the training windows, in nats per target token.",),
    )


def _conflict_sections(run: History, charts: Mapping[str, Plot]) -> list[Section]:
    if "cosine" not in charts and "weights" not in charts:
        averages = run.info is not None and run.info["mode"] == "plain"
        why = "this run averages, so it resolves nothing" if averages else "no step with weights and cosines"
        return [Section("Conflicts", words=(f"Nothing to show: {why}.",))]
    by_block = sorted(
        zip(run.blocks, map(float, run.conflict), strict=True), key=lambda row: -1.0 if math.isnan(row[1]) else row[1]
    )[::-1]
    pairs = [
        (f"{one}, {other}", run.cosine[np.isfinite(run.cosine[:, i, j]), i, j])
        for (i, one), (j, other) in itertools.combinations(enumerate(run.languages), 2)
    ]
    pair_rows = sorted(
        ((name, float(known.mean()), float(conflicts(known).mean())) for name, known in pairs if known.size),
        key=lambda row: row[1],
    )
    sections = [
        Section(
            "Conflicts between languages",
            words=("Two languages conflict on a block where the cosine of their gradients is negative.",),
            table=Table(
                "Pairs",
                ("pair", "mean cosine", "share of blocks with a negative mean"),
                tuple((name, f"{mean:+.3f}", f"{share:.0%}") for name, mean, share in pair_rows),
                frozenset(),
                (),
            ),
            plots=_chosen(charts, "cosine"),
        ),
        Section(
            "Conflicts by block",
            table=Table(
                "Blocks",
                ("block", "share of conflicting pairs, mean over steps"),
                tuple((name, "-" if math.isnan(share) else f"{share:.0%}") for name, share in by_block),
                frozenset(),
                (),
            ),
        ),
    ]
    if "weights" in charts:
        sections.append(Section("Weights", plots=(charts["weights"],)))
    return sections


def _comparison_page(run_dir: Path) -> Page:
    results = read_json(run_dir / RESULTS)
    comparison = compare(results)
    runs, warnings = _runs(run_dir, comparison.methods, comparison.seeds)
    languages = [language for group in comparison.groups for language in group.languages]
    curves: dict[str, dict[str, Sequence[Curve]]] = {
        language: {method: [run.bits_per_byte(language) for run in found] for method, found in runs.items()}
        for language in languages
    }
    charts = _stored(
        run_dir / "plots",
        {
            "differences": plots.differences(comparison),
            "bits_per_byte": plots.method_curves(
                curves, "Held-out bits per byte (mean over seeds; band: least to greatest)", "bits per byte"
            ),
            "loss": plots.method_curves(
                {
                    language: {method: [run.loss(language) for run in found] for method, found in runs.items()}
                    for language in languages
                },
                "Training loss (mean over seeds; band: least to greatest)",
                "nats per target token",
            ),
        },
    )
    facts = [("baseline", comparison.baseline), ("methods", ", ".join(comparison.methods))]
    facts += [("seeds", ", ".join(map(str, comparison.seeds)))]
    facts += [(key, str(value)) for key, value in (results.get("machine") or {}).items()]
    return Page(
        title=comparison.title,
        warnings=tuple(warnings),
        facts=tuple(facts),
        sections=(
            *(
                Section(table.title, words=(group.headline,), table=table)
                for group, table in zip(comparison.groups, tables(comparison), strict=True)
            ),
            Section("Change by language", plots=_chosen(charts, "differences")),
            Section("Curves", plots=_chosen(charts, "bits_per_byte", "loss")),
            *(section for method, found in runs.items() for section in _method_sections(run_dir, method, found[0])),
        ),
        texts=_texts(run_dir, results),
    )


def _method_sections(run_dir: Path, method: str, run: History) -> tuple[Section, ...]:
    """Conflicts and weights of one run of a method, its first seed; none for a method that resolves nothing."""
    charts = _stored(
        run_dir / "plots",
        {f"{method}-{name}": png for name, png in _conflict_charts(run).items()},
    )
    shown = tuple(charts.values())
    return (Section(f"{method}: conflicts and weights of the first seed", plots=shown),) if shown else ()


def _runs(run_dir: Path, methods: Iterable[str], seeds: Iterable[int]) -> tuple[dict[str, list[History]], list[str]]:
    runs: dict[str, list[History]] = {}
    missing = []
    for method, seed in itertools.product(methods, seeds):
        path = run_dir / "runs" / f"{method}-seed{seed}" / METRICS
        if path.is_file():
            runs.setdefault(method, []).append(load(path))
        else:
            missing.append(f"{method}-seed{seed}")
    return runs, [f"No metrics of these runs, so they have no curve: {', '.join(missing)}."] if missing else []


def _texts(run_dir: Path, record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    texts = [("Command", record["command"])] if record.get("command") else []
    for title, file in (("Command", "command.txt"), ("Configuration", "config.json")):
        if (run_dir / file).is_file() and title not in dict(texts):
            texts.append((title, (run_dir / file).read_text(encoding="utf-8")))
    texts += [
        (title, "\n".join(f"{key}: {value}" for key, value in record[name].items()))
        for title, name in (("Settings of the run", "config"), ("Provenance", "provenance"), ("Versions", "versions"))
        if record.get(name)
    ]
    return tuple(texts)


def _stored(folder: Path, charts: Mapping[str, bytes | None]) -> dict[str, Plot]:
    stored = {}
    for name, png in charts.items():
        path = folder / f"{name}.png"
        if png is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        folder.mkdir(exist_ok=True)
        path.write_bytes(png)
        stored[name] = Plot(name.replace("_", " "), path.name, base64.b64encode(png).decode())
    return stored


def _chosen(charts: Mapping[str, Plot], *names: str) -> tuple[Plot, ...]:
    return tuple(charts[name] for name in names if name in charts)


def _end(curve: Curve, index: int) -> str:
    return f"{curve.values[index]:.3f}" if curve.steps.size else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
