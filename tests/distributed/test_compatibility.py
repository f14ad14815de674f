"""Every feature of DeepSpeed on every stage of ZeRO: right, or refused with a reason, as the documentation says.

A cell of docs/compatibility.md is what came of one case here: "tested" where the combined gradient was the float64
reference's (or, of checkpoints and compilation, where the bits were those of a run without), "refused" with the message
otherwise. `benchmarks/results/compatibility.json` holds the cells, and a cell that comes out otherwise fails. Every run
tries each feature on one stage, drawn anew; the nightly list tries all. All cells, slow ones too, make the file anew,
and `python benchmarks/readme.py` the page from it:

    BUCKETMOO_COMPATIBILITY_JSON=benchmarks/results/compatibility.json pytest tests/distributed/test_compatibility.py
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from distributed.tolerances import tolerance
from draw import SEED, Case, Key
from outcomes import Outcomes, Results

WORLD_SIZE = 2
STAGES = (0, 1, 2, 3)
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "compatibility.json"


class Feature(NamedTuple):
    """A row of the table.

    Args:
        name: what the table calls it.
        case: fields of `Case` in compare_with_reference.py, or arguments of the scenario.
        stages: where DeepSpeed has it.
        scenario: a function of try_features.py; of those but `parity`, bits are compared.
        compiles: the op of DeepSpeed's that it needs, which takes minutes to compile.
    """

    name: str
    case: Case = {}  # noqa: RUF012 (never changed)
    stages: tuple[int, ...] = STAGES
    scenario: str = "parity"
    compiles: Any = None


def top(**entries: Any) -> Case:
    return {"top": entries}


def zero(**entries: Any) -> Case:
    return {"zero": entries}


NVME = {"device": "nvme", "nvme_path": tempfile.gettempdir()}
ZERO, PARTITIONED, SHARDED = (1, 2, 3), (1, 2), (3,)
FEATURES: dict[str, list[Feature]] = {
    "Numbers": [
        Feature("float32"),
        Feature("`bf16`", {"dtype": "bf16"}),
        Feature("`bf16`, `grad_accum_dtype: fp32`", {"dtype": "bf16", "accumulate": "fp32"}),
        Feature(
            "`bf16`, `communication_data_type: fp32`", {"dtype": "bf16", "top": {"communication_data_type": "fp32"}}
        ),
        Feature("`fp16`, dynamic loss scale", {"dtype": "fp16"}),
        Feature("`torch_autocast` in bfloat16", {"autocast": True}),
        Feature("`torch_autocast` in float16", top(torch_autocast={"enabled": True, "dtype": "float16"})),
        Feature("`gradient_clipping`", {"clip": 0.3}),
    ],
    "Windows": [
        Feature("one micro-step, streaming", {"micro_steps": 1, "languages": 2}),
        Feature("several micro-steps, a rank keeps its language", {"affinity": "window", "languages": 2}),
        Feature("several micro-steps, a rank changes language", {"affinity": "micro_step", "languages": 4}),
        Feature("micro-batches without a target token", {"empty": True}),
        Feature("several forward passes before a backward", {"forwards": 2}),
        Feature("`Accelerator.accumulate` (`engine.no_sync`)", {"no_sync": True}),
        Feature("`engine.no_sync` without `gradient_accumulation_steps`", scenario="bare_no_sync"),
        Feature("`engine.coalesce_grad_reduction`", scenario="coalesced"),
        Feature(
            "`managed_gradient_accumulation: false`", {"micro_steps": 1} | top(managed_gradient_accumulation=False)
        ),
    ],
    "Models": [
        Feature("tied weights", {"tied": True}),
        Feature("frozen parameters", {"frozen": True}),
        Feature("LoRA", {"model": "lora"}),
        Feature("several parameter groups", {"groups": True}),
        Feature("parameters that no rank uses", {"adapters": 1}),
        Feature("parameters of one language (ranks use different ones)", {"adapters": 2, "used_adapters": [0, 1]}),
        Feature("activation checkpointing", {"checkpoint": "no_reentrant"}),
        Feature("activation checkpointing, reentrant", {"checkpoint": "reentrant"}),
        Feature("`engine.compile()`", scenario="compiled"),
        Feature("sparse embeddings", {"model": "sparse"}),
        Feature("mixture-of-experts layers", scenario="experts"),
    ],
    "ZeRO": [
        Feature("`overlap_comm: true`", {"overlap": True}, ZERO),
        Feature("`reduce_scatter: false`", zero(reduce_scatter=False), ZERO),
        Feature("`contiguous_gradients: false`", zero(contiguous_gradients=False), ZERO),
        Feature("`round_robin_gradients`", {"round_robin": True}, PARTITIONED),
        Feature("`sub_group_size`", zero(sub_group_size=500), SHARDED),
        Feature("`stage3_param_persistence_threshold: 0`", zero(stage3_param_persistence_threshold=0), SHARDED),
        Feature("all parameters persistent", zero(stage3_param_persistence_threshold=10**6), SHARDED),
        Feature("`zero_hpz_partition_size` (hpZ)", zero(zero_hpz_partition_size=2), SHARDED),
        Feature("`zero_quantized_gradients` (qgZ)", zero(zero_quantized_gradients=True), SHARDED),
        Feature("`prescale_gradients`", top(prescale_gradients=True)),
        Feature("`gradient_predivide_factor`", top(gradient_predivide_factor=2.0)),
        Feature("`gradient_allreduce_op: sum`", top(gradient_allreduce_op="sum")),
        Feature("`compile.deepcompile`", top(compile={"deepcompile": True})),
        Feature("`zenflow`", zero(zenflow={"topk_ratio": 0.1}), PARTITIONED),
    ],
    "Offload": [
        Feature("optimizer to the CPU, torch's Adam", {"offload": True}, ZERO),
        Feature(
            "optimizer to the CPU, DeepSpeed's Adam", {"offload": True, "cpu_adam": True}, ZERO, compiles=CPUAdamBuilder
        ),
        Feature("optimizer and parameters to the CPU", {"offload": True, "offload_params": True}, SHARDED),
        Feature("`super_offload`", zero(offload_optimizer={"device": "cpu", "super_offload": True}), SHARDED),
        Feature(
            "optimizer to NVMe", {"cpu_adam": True} | zero(offload_optimizer=NVME), SHARDED, compiles=AsyncIOBuilder
        ),
        Feature("parameters to NVMe", zero(offload_param=NVME), SHARDED, compiles=AsyncIOBuilder),
    ],
    "bucket_moo": [
        Feature("`granularity: parameter`", {"granularity": "parameter"}),
        Feature("`granularity: layer`", {"granularity": "layer"}),
        Feature("`granularity: model`", {"granularity": "model"}),
        Feature("`row_storage: host`", {"moo": {"row_storage": "host"}}),
        Feature("`row_storage: bfloat16`", {"moo": {"row_storage": "bfloat16"}, "aggregator": "mean"}),
        Feature("checkpoints: saved and resumed", scenario="resumed"),
    ],
    "Other parallelism": [
        Feature("pipelines", scenario="pipeline"),
        Feature("sequence parallelism", scenario="sequence_parallel"),
        Feature("tensor parallelism (`mpu`)", scenario="model_parallel"),
        Feature("the Muon optimizer", {"model": "muon"}),
    ],
}
ROWS = [feature for features in FEATURES.values() for feature in features]


class Cell(NamedTuple):
    feature: str
    stage: int


def feature_of(cell: Cell) -> Feature:
    return next(feature for feature in ROWS if feature.name == cell.feature)


def case_of(feature: Feature, stage: int) -> Case:
    if feature.scenario != "parity":
        return {"scenario": feature.scenario, "stage": stage} | feature.case
    return {
        "scenario": "parity",
        "stage": stage,
        "seed": SEED + 10 * ROWS.index(feature) + stage,
        "micro_steps": 2,
        "languages": 2 if stage == 1 or feature.case.get("affinity") == "window" else 3,
    } | feature.case


CELLS = {(WORLD_SIZE, f"{each.name} on ZeRO-{stage}"): Cell(each.name, stage) for each in ROWS for stage in each.stages}
CASES = {key: case_of(feature_of(cell), cell.stage) for key, cell in CELLS.items()}


def every_cell() -> Iterator[Any]:
    draw = random.Random(SEED)
    drawn = {Cell(feature.name, draw.choice(feature.stages)) for feature in ROWS}
    for key, cell in CELLS.items():
        marks = [] if cell in drawn else [pytest.mark.nightly]
        if builder := feature_of(cell).compiles:
            cannot = not builder().is_compatible(verbose=False)
            reason = f"DeepSpeed cannot build {builder.NAME} here (async_io: install libaio-dev)"
            marks = [pytest.mark.slow, pytest.mark.skipif(cannot, reason=reason)]
        yield pytest.param(key, marks=marks, id=key[1])


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    found = Outcomes(request, "try_features.py", CASES, timeout=900)
    yield found
    found.write("BUCKETMOO_COMPATIBILITY_JSON", summary)


def said_of(key: Key, results: Results) -> str:
    """What the table says of a cell."""
    first = results[0]
    if "refused" in first:
        who = "" if first["ours"] else "by DeepSpeed: "
        return f"refused: {who}{without_numbers(first['refused'])}"
    limit = tolerance(CASES[key]) if CASES[key]["scenario"] == "parity" else 0.0
    worst = max(result["error"] for result in results)
    return "tested" if worst <= limit else f"wrong: off by {worst}, {CASES[key]}"


def without_numbers(message: str) -> str:
    """The first line, without what differs from run to run (languages are drawn) or between installations."""
    line = message.strip().splitlines()[0] if message.strip() else "an error without a message"
    return re.sub(r"0x[0-9a-f]+|/[\w./-]*/site-packages|(?<=rank )\d+|(?<=\")l\d+(?=\")", "...", line)


def summary(outcomes: Outcomes) -> dict[str, Any]:
    said = {CELLS[key]: said_of(key, results) for key, results in outcomes.items()}
    table = {
        group: [
            {"feature": each.name, "stages": {stage: said[Cell(each.name, stage)] for stage in each.stages}}
            for each in features
        ]
        for group, features in FEATURES.items()
    }
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed")}
    columns = {stage: f"ZeRO-{stage}" for stage in STAGES}
    return {
        "what": "tests/distributed/test_compatibility.py",
        "versions": versions,
        "columns": columns,
        "table": table,
    }


@pytest.fixture(scope="module")
def committed() -> dict[Cell, str]:
    table = json.loads(COMMITTED.read_text(encoding="utf-8"))["table"]
    return {
        Cell(row["feature"], int(stage)): said
        for rows in table.values()
        for row in rows
        for stage, said in row["stages"].items()
    }


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("key", list(every_cell()))
def test_cell_is_what_the_documentation_says(key: Key, outcomes: Outcomes, committed: dict[Cell, str]) -> None:
    results = outcomes[key]
    assert said_of(key, results) == committed.get(CELLS[key]), f"{results}, {outcomes.explain(key)}"
    assert len({"refused" in result for result in results}) == 1, f"ranks differ: {results}"


def test_the_documentation_says_nothing_else(committed: dict[Cell, str]) -> None:
    assert set(committed) == set(CELLS.values())


def test_nothing_is_wrong(committed: dict[Cell, str]) -> None:
    for cell, said in committed.items():
        assert said == "tested" or said.startswith("refused: "), f"{cell}: {said}"
