"""The table of frameworks: what it names is there, and the pages that list frameworks list all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bucketmoo_ds
from bucketmoo_ds.adapters import table
from bucketmoo_ds.adapters.table import FRAMEWORKS, Framework
from bucketmoo_ds.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"

every_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.title)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of all tables below a heading of a page."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")] for line in re.findall(r"^\|(.*)\|$", section, re.MULTILINE)]


@every_framework
def test_what_users_call_is_the_adapters(framework: Framework) -> None:
    found = bucketmoo_ds
    for name in framework.public.split("."):
        found = getattr(found, name)
    assert callable(found)
    assert found.__module__.startswith(framework.module)


@every_framework
def test_an_entry_is_found_and_fits_the_planner(framework: Framework) -> None:
    assert table.find(framework.name, framework.stage) is framework
    assert framework.plain in ("", "all-reduce", "reduce-scatter")
    assert framework.combined in ("", "all-gather", "owners", "replicas")
    assert framework.exchanged in (table.EVERY_MICRO_STEP, table.ONCE_A_WINDOW, table.EITHER)
    assert (framework.combined == "replicas") == (not framework.no_replicas)
    assert (framework.wrap is None) == (framework.stage is not None)


def test_titles_and_places_are_unique() -> None:
    assert len({each.title for each in FRAMEWORKS}) == len({(each.name, each.stage) for each in FRAMEWORKS})
    assert len({each.title for each in FRAMEWORKS}) == len(FRAMEWORKS)


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("fsdp", None, r'framework = "fsdp": unknown, expected one of .*; did you mean "fsdp\d"\?'),
        ("deepspeed", None, "stage = None: expected 0, 1, 2 or 3, the stage of"),
        ("ddp", 1, 'stage = 1: "ddp" has no stages; use framework = "deepspeed"'),
    ],
)
def test_what_is_not_there(name: str, stage: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table.find(name, stage)


def test_it_imports_no_framework() -> None:
    script = "import sys, bucketmoo_ds.adapters.table; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@every_framework
def test_wrappers_md_says_how_it_is_switched_on(framework: Framework) -> None:
    (row,) = [row for row in rows("wrappers.md", "Switching it on") if framework.title in row[0]]
    assert f"bm.{framework.public}(" in row[1]


@every_framework
def test_planning_md_counts_it(framework: Framework) -> None:
    (row,) = [row for row in rows("planning.md", "What is counted") if framework.title in re.split(", ", row[0])]
    if framework.plain:
        assert framework.plain in row[1]
    assert (framework.combined == "all-gather") == ("all-gather" in row[3])
    assert (framework.combined == "owners") == ("owners" in row[3])
