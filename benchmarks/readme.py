"""Copies the committed results into the README, so that nobody types a number: `python benchmarks/readme.py`.

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

import step_table

from bucketmoo_ds.monitor.comparison import compare
from bucketmoo_ds.monitor.tables import to_markdown

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


# What stands in the README under a name: its file, and how it is rendered.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "step": ("step-cpu.json", step_table.render),
    "quickstart": ("quickstart-cpu.json", quickstart),
}


def rendered(text: str) -> str:
    """Returns the README's text with every section made anew."""
    for name, (file, render) in SECTIONS.items():
        result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        section = f"<!-- results: {name} -->\n\n{render(result).strip()}\n\n<!-- end: {name} -->"
        pattern = rf"<!-- results: {name} -->.*?<!-- end: {name} -->"
        text, found = re.subn(pattern, lambda _, section=section: section, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md: expected one section {name!r}, found {found}")
    return text


def main() -> None:
    """Writes or checks the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = rendered(text)
    if parser.parse_args().check:
        sys.exit("README.md: run python benchmarks/readme.py" if wanted != text else 0)
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
