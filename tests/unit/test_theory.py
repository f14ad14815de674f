"""docs/theory.md: what is said there is held by tests, which are named and exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = dict(re.findall(r"^## (\d+\. .*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/theory.md").read_text(), re.M | re.S))


@pytest.mark.parametrize("title", [title for title in SECTIONS if not title.startswith("1.")])
def test_every_section_names_tests_that_exist(title: str) -> None:
    """A name without a folder is below the one that its list names."""
    (held,) = re.findall(r"^\*Held by\*(.*?)(?:\n\n|\Z)", SECTIONS[title], re.M | re.S)
    below = re.match(r", below `([a-z_/]+)`:", held)
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", held)
    assert len(named) >= 3
    assert held.count("::") == len(named), "a name that is not read"
    for file, test in named:
        folders = [ROOT / "tests"] + ([ROOT / "tests" / below[1]] if below else [])
        found = [folder / file for folder in folders if (folder / file).exists()]
        assert found, file
        assert re.search(rf"^ *def {test}\(", found[0].read_text(), re.M), f"{file}::{test}"


def test_no_other_granularity_claims_refined_stationarity() -> None:
    """Neither here nor on another page."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"refined (pareto )?stationar", line, re.I):
                assert page.name == "theory.md", page
