"""What peft adds, and layers that are frozen and unfrozen in training: right under every wrapper, placed and mixed,
or refused with a reason, as the documentation says.

A cell of docs/compatibility.md is what came of one case here: "exact" where the combined gradient was the reference's,
frozen parameters stayed where they were, and none of them was left a gradient; "refused" with the message otherwise.
Every run tries each row under one wrapper in one mode, drawn anew; the nightly list tries all. All cells make the file
anew, and `python benchmarks/readme.py` the page from it:

    BUCKETMOO_FINE_TUNING_JSON=benchmarks/results/fine-tuning.json pytest tests/distributed/test_fine_tuning.py

The error is relative to the norms of the weighted rows. In float64 it is 1e-12 mixed, and 5e-7 placed, where rows are
float32. DeepSpeed trains in float32, in which plain autograd alone is off by up to 2.3e-6 (of 40 of these models with
rsLoRA; the median is 4.5e-7): 4e-6, as in unit/mixed/language_models.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from draw import SEED, Case, Key, parametrized
from outcomes import Outcomes, Results

pytest.importorskip("peft")

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "fine-tuning.json"
WRAPPERS = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
MODES = {"placed": "One language a micro-batch", "mixed": 'Mixed (`mode: "mixed"`)'}
PEFT = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "modules_to_save": "LoRA with `modules_to_save`",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "p-tuning": "p-tuning",
    "prefix": "prefix tuning",
    "prefix_projection": "prefix tuning with `prefix_projection`",
}
IN_TURN = {
    "layers_in_turn": "other layers frozen in every window",
    "parts_in_turn": "other parameters frozen in every window",
    "unfrozen": "unfrozen after register what was frozen then",
    "masked": "gradients masked by hooks (`register_hook`)",
}
METHODS = PEFT | IN_TURN


class Cell(NamedTuple):
    mode: str
    method: str
    wrapper: str


CELLS: dict[Key, Cell] = {
    (1 if wrapper == "single" else 2, f"{method} under {wrapper}, {mode}"): Cell(mode, method, wrapper)
    for mode in MODES
    for method in METHODS
    for wrapper in WRAPPERS
}


def case_of(cell: Cell) -> Case:
    unused = {"find_unused_parameters": True} if cell.wrapper == "ddp" and cell.method in IN_TURN else {}
    seed = random.Random(f"{SEED}/{cell}").randrange(10**6)
    return {"method": cell.method, "wrapper": cell.wrapper, "mode": cell.mode, "seed": seed} | unused


CASES = {key: case_of(cell) for key, cell in CELLS.items()}


def drawn() -> set[Key]:
    """Of each method one."""
    draw = random.Random(f"{SEED}/fine tuning")
    by_method: dict[str, list[Key]] = {}
    for key, cell in CELLS.items():
        by_method.setdefault(cell.method, []).append(key)
    return {draw.choice(keys) for keys in by_method.values()}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    found = Outcomes(request, "fine_tuned.py", CASES, timeout=900)
    yield found
    found.write("BUCKETMOO_FINE_TUNING_JSON", summary)


def said_of(cell: Cell, results: Results) -> str:
    """What the table says of a cell."""
    first = results[0]
    if "refused" in first:
        message = first["refused"].removeprefix("rank 0: ").partition("; rank 1: ")[0].partition(" Freeze its")[0]
        return f"refused: {message if first['ours'] else 'not by us: ' + message}"
    limit = 4e-6 if cell.wrapper.startswith("zero") else 5e-7 if cell.mode == "placed" else 1e-12
    worst = max(result["told"] for result in results)
    strays = max(result["moved"] + result["held"] for result in results)
    return "exact" if worst <= limit and not strays else f"wrong: off by {worst}, strays {strays}"


def summary(outcomes: Outcomes) -> dict[str, Any]:
    said = {CELLS[key]: said_of(CELLS[key], results) for key, results in outcomes.items()}
    table = {
        title: [
            {"feature": name, "stages": {wrapper: said[Cell(mode, method, wrapper)] for wrapper in WRAPPERS}}
            for method, name in METHODS.items()
        ]
        for mode, title in MODES.items()
    }
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    return {
        "what": "tests/distributed/test_fine_tuning.py",
        "versions": versions,
        "columns": WRAPPERS,
        "table": table,
    }


@pytest.fixture(scope="module")
def committed() -> dict[Cell, str]:
    table = json.loads(COMMITTED.read_text(encoding="utf-8"))["table"]
    methods = {name: method for method, name in METHODS.items()}
    return {
        Cell(mode, methods[row["feature"]], wrapper): said
        for mode, title in MODES.items()
        for row in table[title]
        for wrapper, said in row["stages"].items()
    }


@pytest.mark.timeout(1000)
@parametrized(CELLS, drawn())
def test_cell_is_what_the_documentation_says(key: Key, outcomes: Outcomes, committed: dict[Cell, str]) -> None:
    results = outcomes[key]
    assert said_of(CELLS[key], results) == committed.get(CELLS[key]), f"{results}, {outcomes.explain(key)}"
    assert len({result.get("when") for result in results}) == 1, f"ranks differ: {results}"


def test_nothing_is_wrong(committed: dict[Cell, str]) -> None:
    assert set(committed) == set(CELLS.values())
    for cell, said in committed.items():
        assert said == "exact" or said.startswith("refused: "), f"{cell}: {said}"
