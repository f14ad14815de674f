"""The recipes of CONTRIBUTING.md, followed as they stand there: each in a copy of the package with what it adds.

A copy holds the package's files and only those that the recipe names; what was added trains on the CPU, in a process of
its own, held against the float64 reference.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import launch
import pytest

from bucketmoo_ds.aggregate import names
from bucketmoo_ds.plan.blocks import GRANULARITIES

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))

# Relative to the norms of the weighted rows, as in test_ddp.py for micro-batches of different length: three gradients
# of a language are added up in float32, at 2^-24 a rounding, and each was a sum itself.
TOLERANCE = 1e-6


def recipe(path: str) -> str:
    """What CONTRIBUTING.md says that stands in this file, or is added to it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```python\n# (\S+)\n(.*?)```", text, flags=re.DOTALL))[path]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, as it is installed."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bucketmoo_ds", tmp_path / "bucketmoo_ds", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "bucketmoo_ds/kernels", ignore=ignored)
    return tmp_path


def follow(name: str, copy: Path) -> tuple[dict[str, Any], str]:
    """What the worker found with the copy, and what it printed."""
    (outcome,) = launch.launch("follow_recipe.py", 1, [{"copy": str(copy), "recipe": name, "seed": SEED}])
    explanation = f"BUCKETMOO_TEST_SEED={SEED}\n{outcome.output[-4000:]}"
    assert outcome.result and "error" not in outcome.result[0], explanation
    found: dict[str, Any] = outcome.result[0]
    assert Path(found["package"]).is_relative_to(copy)
    assert found["gradient"] < TOLERANCE, explanation
    assert found["counters"]["windows"] == 2
    return found, outcome.output


def test_a_new_aggregator_is_one_file(copy: Path) -> None:
    path = "bucketmoo_ds/aggregate/inverse_norm.py"
    (copy / path).write_text(recipe(path))
    found, _ = follow("aggregator", copy)
    assert found["weights_of"] == [[pytest.approx(2 / 3, abs=1e-15), pytest.approx(1 / 3, abs=1e-15)]]


def test_a_new_backend_is_one_file(copy: Path) -> None:
    path = "bucketmoo_ds/ops/backends/plain.py"
    (copy / path).write_text(recipe(path))
    found, _ = follow("backend", copy)
    assert found["auto"] == "plain", "it has the highest priority on the CPU"
    assert found["calls"] > 0
    assert found["backends"] == ("reference", "cpu", "triton", "cuda", "plain")


def test_a_new_granularity_is_one_function(copy: Path) -> None:
    path = "bucketmoo_ds/plan/blocks.py"
    with (copy / path).open("a") as file:
        file.write(f"\n\n{recipe(path)}")
    found, _ = follow("granularity", copy)
    assert found["blocks"] == ("a", "b.0")


def test_a_new_framework_is_one_adapter_and_one_entry(copy: Path) -> None:
    """The adapter of one process, under another name, stands for that of a framework of one process."""
    adapters = copy / "bucketmoo_ds/adapters"
    (adapters / "toy.py").write_text((adapters / "single.py").read_text().replace("single.register", "toy.register"))
    table, start = adapters / "table.py", "FRAMEWORKS: tuple[Framework, ...] = (\n"
    assert table.read_text().count(start) == 1
    table.write_text(table.read_text().replace(start, start + recipe("bucketmoo_ds/adapters/table.py")))
    found, printed = follow("framework", copy)
    assert "Toy, 1B parameters" in printed, "the planner knows it"
    assert found["public"] == "bucketmoo_ds.adapters.toy"
    assert "toy" in found["alone"], "it has to train to the same weights as all others"


@pytest.mark.parametrize(
    ("page", "known"),
    [("theory.md", names()), ("guide.md", tuple(GRANULARITIES))],
    ids=["aggregators", "granularities"],
)
def test_the_line_of_docs(page: str, known: tuple[str, ...]) -> None:
    first_cells = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(known) <= set(first_cells)
