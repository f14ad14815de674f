"""`bucketmoo plan`: what it prints, as text and as JSON, and what it answers to bad input."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from bucketmoo_ds.apps.cli.main import main
from bucketmoo_ds.apps.cli.plan import _runs, _short, _whole
from bucketmoo_ds.apps.planner import Setup, forecast
from bucketmoo_ds.errors import ConfigError

DOCUMENT = Path(__file__).parents[2] / "docs" / "planning.md"
CLUSTER = ("--world", "64", "--per-node", "8", "--languages", "8")


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """Returns what the command prints, to standard error where it fails."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    output = capsys.readouterr()
    assert ended.value.code == status, output.err
    assert not (output.err if status == 0 else output.out)
    return output.out if status == 0 else output.err


def rows(text: str, first: str) -> list[str]:
    """The cells of the first table row that begins like this."""
    found = next(line for line in text.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in found.strip("│").split("│")]


def test_layout_bytes_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *CLUSTER, "--parameters", "8B")
    assert "exchange: two_stage (a window has 8 places of a whole node for 8 languages)" in text
    assert [rows(text, str(node)) for node in range(8)] == [
        [str(node), f"{8 * node}-{8 * node + 7}", str(node)] for node in range(8)
    ]
    # 32 GB of gradient: 63/64 of it; between nodes an eighth of that in a ring, 56/64 flat, 7/64 in two stages. The
    # Grams of 32 blocks, 8 x 8 numbers of 8 bytes, to 63 ranks.
    assert rows(text, "plain reduce-scatter") == [
        "plain reduce-scatter", "", "31.5 GB", "", "", "31.5 GB", "1.00", "3.9 GB", "1.00",
    ]  # fmt: skip
    assert rows(text, "flat") == ["flat", "8", "31.5 GB", "", "1.0 MB", "31.5 GB", "1.00", "28.0 GB", "7.11"]
    assert rows(text, "two_stage *")[1:] == ["8", "31.5 GB", "", "1.0 MB", "31.5 GB", "1.00", "3.5 GB", "0.89"]
    assert rows(text, "float32") == ["float32", "4.0 GB", ""]
    assert rows(text, "bfloat16") == ["bfloat16", "2.0 GB", ""]
    assert rows(text, "host") == ["host", "125.0 MB", "4.0 GB"]
    assert "WARNING" not in text
    assert '"exchange": "two_stage", "ranks_per_node": 8\n' in text
    assert text.endswith("LanguageBatchSampler(..., ranks_per_node=8)\n")


def test_warns_where_languages_share_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *CLUSTER, "--languages", "16")
    assert "exchange: flat" in text
    assert rows(text, "0") == ["0", "0-7", "0-7"]
    assert rows(text, "flat *")[1] == "16"
    assert rows(text, "two_stage")[1] == "8"
    assert "WARNING: the ranks of a node train on different languages" in text
    assert "use micro_steps = 2" in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--framework", "ddp"), ["plain all-reduce", "window: 1; DDP"]),
        (("--framework", "single", "--world", "1", "--per-node", "1"), ["plain │", "window: 1; one process"]),
        (("--framework", "deepspeed", "--stage", "0"), ["plain all-reduce", "ZeRO-0"]),
        (("--framework", "deepspeed", "--stage", "2"), ["plain all-reduce", "the most that ZeRO-1/2", "ZeRO-2"]),
        (("--framework", "deepspeed", "--stage", "3"), ["plain reduce-scatter", "ZeRO-3"]),
        (("--framework", "fsdp1"), ["plain reduce-scatter", "FSDP1"]),
        (("--replicas", "8"), ["8 replicas", "all-reduce"]),
        (("--dtype", "bf16", "--parameters", "20M"), ["20M parameters, bf16"]),
        (("--micro-steps", "4", "--once-a-window"), ["once a window", "all micro-steps", '=8, affinity="window")']),
        (("--micro-steps", "12"), ["8 of 12 micro-steps; --json has all."]),
        (("--per-node", "1"), ["16 of 64 nodes; --json has all.", "every rank is a node of its own"]),
        (("--gram", "cross"), ["rows on a rank, two a language (gram: cross):", '"gram": "cross"']),
        (("--exchange", "flat"), ['use exchange = "auto"', 'section: "exchange": "flat"']),
    ],
)
def test_options(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: list[str]) -> None:
    text = run(capsys, *CLUSTER, *words)
    assert max(map(len, text.splitlines())) <= 120
    for each in expected:
        assert each in " ".join(text.split())  # wherever lines were broken


def test_json_is_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--micro-steps 2 --parameters 1.5M --dtype bf16 --framework deepspeed --stage 1 --buckets 7 --blocks 70"
    setup = Setup(
        world_size=64,
        ranks_per_node=8,
        languages=8,
        parameters=1_500_000,
        micro_steps=2,
        dtype="bf16",
        framework="deepspeed",
        stage=1,
        buckets=7,
        blocks=70,
        exchange="two_stage",
    )
    printed = json.loads(run(capsys, *CLUSTER, *words.split(), "--exchange", "two_stage", "--json"))
    assert printed == json.loads(json.dumps(forecast(setup).to_json()))
    assert printed["layout"] == [list(range(8))] * 2
    other = json.loads(run(capsys, *CLUSTER, "--replicas", "4", "--once-a-window", "--json"))
    assert (other["setup"]["replicas"], other["setup"]["once_a_window"]) == (4, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--world", "sixty"), '--world-size "sixty": expected a whole number, such as 64, 20M or 8B'),
        (("--per-node", "1.5"), '--ranks-per-node "1.5"'),
        (("--parameters", "8T"), '--parameters "8T"'),
        (("--languages", "-8"), '--languages "-8"'),
        (("--per-node", "7"), "ranks_per_node = 7: world_size = 64 is no multiple of it"),
        (("--micro-steps", "0"), "micro_steps = 0: expected a whole number, 1 or more"),
        (("--framework", "fsdp"), 'did you mean "fsdp2"'),
        (("--framework", "deepspeed"), "stage = None: expected 0, 1, 2 or 3"),
        (("--per-node", "64", "--exchange", "two_stage"), "64 ranks with 64 a node are not several nodes"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    # argparse takes a value that begins with a dash for an option unless it stands in the same word.
    words = (f"{words[0]}={words[1]}", *words[2:])
    error = run(capsys, *CLUSTER, *words, status=2)
    assert error.startswith("bucketmoo: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "number"), [("64", 64), ("1.5k", 1500), ("20M", 20_000_000), ("8B", 8 * 10**9), ("8.3B", 83 * 10**8)]
)
def test_numbers(text: str, number: int) -> None:
    assert _whole("--parameters", text) == number
    assert _short(number) == text


@pytest.mark.parametrize("text", ["", "8 B", "1e9", "0.5", "1.2345k", "٣x"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="--parameters"):
        _whole("--parameters", text)


def test_runs() -> None:
    assert _runs([0, 1, 2, 3, 0, 1]) == "0-3 0-1"
    assert _runs([5]) == "5"
    assert _runs([7, 0, 1]) == "7 0-1"


def test_the_documents_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"\n```\n\$ (bucketmoo plan [^\n]*)\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert block is not None
    command, output = block.groups()
    printed = run(capsys, *shlex.split(command)[2:])
    assert [line.rstrip() for line in printed.splitlines()] == output.splitlines()
