"""Copies the committed results into the documentation, so that nobody types a number: `python benchmarks/readme.py`.

Between `<!-- results: NAME -->` and `<!-- end: NAME -->` stands what this script renders from `benchmarks/results/`;
`--check` fails where it does not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import integrations
import launchers
import mixed_study_table
import mixed_table
import overlap_table
import rules as rules_speed
import step_table
import versions
import wrappers_table

from bucketmoo_ds.apps.bench import table
from bucketmoo_ds.apps.bench.provenance import headline
from bucketmoo_ds.apps.monitor.comparison import compare
from bucketmoo_ds.apps.monitor.tables import to_markdown
from bucketmoo_ds.apps.simulate import table as simulate_table
from bucketmoo_ds.apps.study import tables as study_tables
from bucketmoo_ds.apps.study.runner import Runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def quickstart(results: dict[str, Any]) -> str:
    """Returns the quickstart's tables with where they come from."""
    source = results["provenance"]
    lines = to_markdown(compare(results)).replace("\n## ", "\n### ").split("\n\n", 1)[1].strip()
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    return (
        f"`{results['command']}`, {machine['processes']} processes on a {machine['device']} ({machine['processor']}), "
        f"{machine['date']}; {source['source']} {source['version']}; {versions}.\n\n{lines}"
    )


def parity(result: dict[str, Any]) -> str:
    """Returns the largest error of distributed runs against the float64 reference, by configuration."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['machine']}; {versions}; commit {result['commit'][:12]}; seed {result['seed']}. "
        "Error of the combined gradient, relative to the sum of the norms of the weighted rows.",
        "",
        "| configuration | cases | largest error | tolerance |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in result["errors"].items():
        lines.append(f"| {name} | {found['cases']} | {found['gradient']:.1e} | {found['tolerance']:.1e} |")
    return "\n".join(lines)


def same_weights(result: dict[str, Any]) -> str:
    """Returns how far every wrapper's trained weights are from the reference, by what the runs share."""
    tolerance = result["tolerance"]
    lines = [
        f"{headline(result)}; seed {result['seed']}. Distance of the trained weights from the float64 reference, "
        f"relative to their norm (tolerance {tolerance['parameters']:.1e}), and the largest difference of a language's "
        f"weight in a window (tolerance {tolerance['weights']:.0e}). The last column compares with FSDP2. Milliseconds "
        "are those of a toy model: overhead.",
        "",
        "| blocks, W ranks, M micro-steps | wrapper | trained weights | languages' weights | from FSDP2 | ms a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in result["runs"]:
        setting = f"{run['granularity']}, W = {run['world_size']}, M = {run['micro_steps']}"
        lines.append(
            f"| {setting} | {run['wrapper']} | {run['parameters']:.1e} | {run['weights']:.1e} | "
            f"{run['from_fsdp2']:.1e} | {run['milliseconds']:.0f} |"
        )
    return "\n".join(lines)


def compatibility(result: dict[str, Any]) -> str:
    """Returns a row for every feature, a column for every stage or wrapper, and below them what refusals say."""
    messages: list[str] = []

    def cell(said: str | None) -> str:
        if said is None:
            return ""
        message = said.removeprefix("refused: ")
        if message == said:
            return said
        if message not in messages:
            messages.append(message)
        return f"refused ({messages.index(message) + 1})"

    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    columns = result["columns"]
    lines = [
        f"{versions}, 2 ranks over gloo.",
        "",
        f"| | {' | '.join(columns.values())} |",
        "| --- |" + " --- |" * len(columns),
    ]
    for group, rows in result["table"].items():
        lines.append(f"| **{group}** |" + " |" * len(columns))
        for row in rows:
            cells = (cell(row["stages"].get(stage)) for stage in columns)
            lines.append(f"| {row['feature']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(messages, start=1))])


def deepspeed_tests(result: dict[str, Any]) -> str:
    """Returns a line for every file of DeepSpeed's own tests, and what became of those that pass without us only."""
    outcomes = ("passed", "failed", "skipped", "refused")
    lines = [
        f"{headline(result['made_by'])}; 2 ranks.",
        "",
        "| tests | stock: passed | failed | skipped | bucket_moo: passed | failed | skipped | refused |",
        "| --- |" + " --- |" * 7,
    ]
    for file, (stock, ours) in result["counts"].items():
        numbers = [stock[each] for each in outcomes[:3]] + [ours[each] for each in outcomes]
        lines.append(f"| {file.removeprefix('unit/')} | {' | '.join(map(str, numbers))} |")
    lines += ["", "Passed with stock, and with bucket_moo not:", ""]
    by_reason: dict[str, list[str]] = {}
    for name, ended in result["differing"].items():
        by_reason.setdefault(ended["reason"].split("\n")[0][:160], []).append(name.split("::", 1)[1])
    lines += [f"* {len(names)}, such as `{names[0]}`: {reason}" for reason, names in by_reason.items()]
    return "\n".join(lines)


def faults(result: dict[str, Any]) -> str:
    """Returns what the other ranks saw of each death, how soon, and what the run was taken up from."""
    lines = [
        f"{headline(result)}; 2 ranks; a checkpoint after every window, so that only the window under way is lost.",
        "",
        "| fault | ZeRO | the other rank saw | after, s | taken up from |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["faults"]:
        seconds = f"{row['seconds']:.2f}" if row["seconds"] else ""
        seen = re.sub(r"\[/\S+\] | \[[\d.]+\]:\d+", "", row["seen"].split(". This is typically")[0])
        lines.append(f"| {row['fault']} | {row['stage']} | {seen} | {seconds} | {row['resumed_from']} |")
    return "\n".join(lines)


def rules(result: dict[str, Any]) -> str:
    """Returns a row for every rule, a column for every property, and what was measured where it does not hold."""
    properties = list(next(iter(result["rules"].values())))
    lines = [
        f"{headline(result['made_by'])}; seed {result['seed']}. A number is what was missed.",
        "",
        f"| rule | {' | '.join(properties)} |",
        "| --- |" + " --- |" * len(properties),
    ]
    for name, found in result["rules"].items():
        cells = ("yes" if each["holds"] else f"no ({each['measured']:.2g})" for each in found.values())
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


# What stands under a name: the page, the file of the result, and how it is rendered.
SECTIONS: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "step": ("README.md", "step-cpu.json", step_table.summary),
    "quickstart": ("README.md", "quickstart-cpu.json", quickstart),
    "step-all": ("docs/benchmarks.md", "step-cpu.json", step_table.render),
    **{
        f"step-zero{stage}": ("docs/benchmarks.md", f"step-zero{stage}-cpu.json", step_table.render)
        for stage in (0, 1, 3)
    },
    "kernels": ("docs/benchmarks.md", "kernels-cpu.json", table.to_markdown),
    "wrappers": ("README.md", "wrappers-cpu.json", wrappers_table.summary),
    "wrappers-all": ("docs/benchmarks.md", "wrappers-cpu.json", wrappers_table.render),
    "mixed": ("docs/benchmarks.md", "mixed-cpu.json", mixed_table.render),
    "mixed-study": ("docs/modes.md", "mixed-study-cpu.json", mixed_study_table.render),
    "same-weights": ("docs/wrappers.md", "same-weights-cpu.json", same_weights),
    "overlap": ("docs/wrappers.md", "overlap-cpu.json", overlap_table.render),
    "compatibility": ("docs/compatibility.md", "compatibility.json", compatibility),
    "fine-tuning": ("docs/compatibility.md", "fine-tuning.json", compatibility),
    **{
        f"{package}-versions": ("docs/compatibility.md", f"{package}-versions.json", versions.render)
        for package in versions.FILES
    },
    "integrations": ("docs/tools.md", "integrations.json", integrations.render),
    "launchers": ("docs/launchers.md", "launchers.json", launchers.render),
    "deepspeed-tests": ("docs/compatibility.md", "deepspeed-tests.json", deepspeed_tests),
    "faults": ("docs/faults.md", "faults-cpu.json", faults),
    "rules": ("docs/theory.md", "rules.json", rules),
    "simulate": ("docs/theory.md", "simulate.json", simulate_table.to_markdown),
    "study": ("docs/study.md", "study.jsonl", lambda records: study_tables.markdown(Runs(records))),
    "rules-speed": ("docs/benchmarks.md", "rules-speed-cpu.json", rules_speed.render),
    "parity": ("docs/benchmarks.md", "parity-cpu.json", parity),
}


def rendered(page: str, text: str) -> str:
    """Returns the text of a page with every section made anew."""
    for name, (where, file, render) in SECTIONS.items():
        if where != page:
            continue
        path = RESULTS / file
        # A machine that nobody had yet, a GPU say, has no file.
        found_there = path.exists()
        made = render(_read(path)) if found_there else f"No `{file}` is committed yet."
        section = f"<!-- results: {name} -->\n\n{made.strip()}\n\n<!-- end: {name} -->"
        pattern = rf"<!-- results: {name} -->.*?<!-- end: {name} -->"
        text, found = re.subn(pattern, lambda _, section=section: section, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{page}: expected one section {name!r}, found {found}")
    return text


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def main() -> None:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in sorted({where for where, _, _ in SECTIONS.values()}):
        text = (ROOT / page).read_text(encoding="utf-8")
        wanted = rendered(page, text)
        if check and wanted != text:
            sys.exit(f"{page}: run python benchmarks/readme.py")
        (ROOT / page).write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
