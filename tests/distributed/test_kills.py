"""A run that is killed at any moment loses at most what came after its last checkpoint.

Ranks die by SIGKILL before, in and after saves, within windows, all together or one alone; the others then end with an
error, soon. What is started again in the same folder ends with the bits of a run that nobody killed. Moments are drawn
anew in every run, from a seed that every failure names and that `BUCKETMOO_TEST_SEED` sets; `BUCKETMOO_TEST_KILLS` is
how many. Of the fixed ones each run has three; the nightly list has all, and with
`BUCKETMOO_FAULTS_JSON` what they came to is written to that file.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch
import pytest
from draw import SEED

from bucketmoo_ds.apps.bench import provenance

WORLD_SIZE = 2
# Of survivors, from the death of a rank to the end of their process. gloo would wait for 45 seconds (see worker.py).
TIME_LIMIT = 40.0

Case = dict[str, Any]

# By stage, with an optimizer state, dropped orders and a sampler that all have to come back.
CASES: dict[int, Case] = {
    stage: {"seed": 30 + stage, "stage": stage, "micro_steps": 2, "dtype": dtype, "offload": offload, "moo": moo}
    for stage, dtype, offload, moo in (
        (0, "fp32", False, {"aggregator": "pcgrad"}),
        (1, "bf16", False, {"aggregator": "pcgrad", "granularity": "layer"}),
        (2, "fp32", True, {"aggregator": "pcgrad", "row_storage": "host"}),
        (3, "fp32", False, {"aggregator": "pcgrad"}),
    )
}
MOMENTS = (
    "forward",
    "exchange of rows",
    "all-reduce of Grams",
    "combine",
    "optimizer step",
    "save of bucket_moo.json",
    "save of DeepSpeed's files",
    "naming of latest",
)
# (stage, moment, call, whether after it, ranks that die)
FIXED: list[tuple[int, str, int, bool, list[int]]] = [
    (1, "exchange of rows", 9, False, [1]),
    (2, "exchange of rows", 9, False, [1]),
    (3, "exchange of rows", 9, False, [0]),
    (0, "all-reduce of Grams", 3, False, [1]),
    (2, "all-reduce of Grams", 3, False, [1]),
    (3, "combine", 9, False, [1]),
    (2, "save of DeepSpeed's files", 4, False, [1]),
    (2, "naming of latest", 3, False, [0, 1]),
]


def drawn() -> Iterator[tuple[int, str, int, bool, list[int]]]:
    draw = random.Random(SEED)
    for _ in range(int(os.environ.get("BUCKETMOO_TEST_KILLS", "3"))):
        ranks = draw.choice(([0], [1], [0, 1]))
        yield draw.choice(list(CASES)), draw.choice(MOMENTS), draw.randint(1, 5), draw.random() < 0.5, ranks


KILLS = [*FIXED, *drawn()]
# Of the fixed ones two within a window, and one of saving.
IN_A_WINDOW, SAVING = FIXED[:-2], FIXED[-2:]
OF_THIS_RUN = [*random.Random(SEED).sample(IN_A_WINDOW, 2), random.Random(SEED).choice(SAVING), *KILLS[len(FIXED) :]]


@pytest.fixture(scope="module")
def uninterrupted(request: pytest.FixtureRequest) -> dict[int, list[dict[str, Any]]]:
    print(f"BUCKETMOO_TEST_SEED={SEED}")
    tests = [item.callspec.params for item in request.session.items if item.path == request.path]
    stages = sorted({test["stage"] for test in tests})
    runs = [{"name": "uninterrupted", "folder": ""} | CASES[stage] for stage in stages]
    return dict(zip(stages, launch.run("train_and_resume.py", WORLD_SIZE, runs), strict=True))


@pytest.fixture(scope="module")
def table() -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    target = os.environ.get("BUCKETMOO_FAULTS_JSON")
    if target and len(rows) == len(FIXED):
        content = provenance.describe() | {"what": "tests/distributed/test_kills.py", "faults": rows}
        Path(target).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "moment", "call", "after", "ranks"),
    [pytest.param(*kill, marks=() if kill in OF_THIS_RUN else pytest.mark.nightly) for kill in KILLS],
    ids=lambda value: str(value).replace(" ", "_"),
)
def test_killed_run_is_taken_up_with_the_same_bits(
    stage: int,
    moment: str,
    call: int,
    after: bool,
    ranks: list[int],
    uninterrupted: dict[int, list[dict[str, Any]]],
    table: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    explained = f"BUCKETMOO_TEST_SEED={SEED}, ZeRO-{stage}, {moment}, call {call}, after: {after}, ranks {ranks}"
    arguments = {"folder": str(tmp_path), "case": CASES[stage]}
    death = {"moment": moment, "call": call, "after": after, "ranks": ranks}
    killed = launch.launch("train_until_killed.py", WORLD_SIZE, arguments | death)
    seen = []
    for rank, outcome in enumerate(killed):
        if rank in ranks:
            # Of several, one may hear of another's death before its own, and ends with an error.
            ends = {-signal.SIGKILL} | ({1} if len(ranks) > 1 else set())
            assert outcome.status in ends, f"{explained}: {outcome.output[-2000:]}"
            continue
        assert outcome.status == 1, f"{explained}: {outcome.result}, {outcome.output[-2000:]}"
        assert outcome.result["message"], explained
        assert outcome.result["seconds"] < TIME_LIMIT, f"{explained}: {outcome.result}"
        seen.append(outcome.result)
    assert any(outcome.status == -signal.SIGKILL for outcome in killed), explained
    saved = latest(tmp_path)
    resumed = launch.launch("train_until_killed.py", WORLD_SIZE, arguments | death | {"ranks": []})
    for rank, outcome in enumerate(resumed):
        whole = uninterrupted[stage][rank]
        assert outcome.result is not None, f"{explained}: {outcome.output[-3000:]}"
        for entry in ("bits", "windows", "counters", "sampler"):
            assert outcome.result.get(entry) == whole[entry], f"{explained}: {outcome.result}"
    if (stage, moment, call, after, ranks) in FIXED:
        table.append(row(stage, moment, ranks, seen, saved))


def latest(folder: Path) -> str:
    """The checkpoint that a run in this folder would go on from."""
    path = folder / "latest"
    return path.read_text() if path.exists() else "none"


def row(stage: int, moment: str, ranks: list[int], seen: list[dict[str, Any]], saved: str) -> dict[str, Any]:
    return {
        "fault": f"rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, ranks))} killed before: {moment}",
        "stage": stage,
        "seen": f"{seen[0]['error']}: {seen[0]['message'].strip().splitlines()[0]}" if seen else "no rank is left",
        "seconds": max((each["seconds"] for each in seen), default=0.0),
        "resumed_from": saved,
    }
