"""Runs DeepSpeed's own tests of ZeRO and gradient accumulation on two CPU ranks, with stock DeepSpeed and with
bucket_moo switched on (`mean` over one language, which is DeepSpeed's own averaging), and compares the outcomes.

    python scripts/deepspeed_tests/run.py --source ~/DeepSpeed --out benchmarks/results/deepspeed-tests.json

The tests come from a checkout of DeepSpeed near the installed version; they are no part of this repository. Further
arguments go to pytest. Tests that want more ranks or a GPU skip in both runs. All of them take an hour and more on two
cores: with `--results` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bucketmoo_ds.apps.bench.provenance import describe, headline

HERE = Path(__file__).resolve().parent
SWITCH = {"DEEPSPEED_TESTS_BUCKET_MOO": json.dumps({"languages": ["all"], "aggregator": "mean"})}
REFUSED = "bucketmoo_ds.errors.ConfigError"
COLOUR = re.compile(r"(?:#x1B|\x1b)\[[0-9;]*m")
RAISED = re.compile(r"^E +([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE)
OUTCOMES = ("passed", "failed", "skipped", "refused")

# Below the checkout's folder tests/unit; a file that it lacks is left out.
FILES = (
    "v1/zero/test_zero_cpu_offload_grad_accum.py",
    "v1/zero/test_zero2_offload_multi_backward.py",
    "v1/zero/test_zero2_gradient_safety.py",
    "runtime/zero/test_zero_shared_loss_gradient.py",
    "runtime/zero/test_zero_grad_clip.py",
    "v1/zero/test_zero_activation_checkpoint_lifecycle.py",
    "v1/zero/test_invalid_grad_norm.py",
    "v1/half_precision/test_gradient_clipping_default.py",
    "v1/zero/test_zero.py",
    "v1/zero/test_zero_user_backward.py",
)

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "2",  # what DeepSpeed's CPU accelerator takes for its number of devices
    "DEEPSPEED_TIMEOUT": "2",  # minutes after which a rank no longer waits for one that has failed
    "DS_TEST_USE_INSTALLED_DEEPSPEED": "1",
    # For tests that call deepspeed.initialize in pytest's own process; the others give their workers their own.
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29499",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a test ended.

    Args:
        outcome: one of `OUTCOMES`; `refused` where bucket_moo has refused a setting at start-up.
        reason: the first line of the error or of the reason for skipping; empty for a pass.
    """

    outcome: str
    reason: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the comparison, and exits with 1 if a test passes with stock DeepSpeed and fails with bucket_moo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of DeepSpeed")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--results", type=Path, help="keeps pytest's results; a file that has one is not run again")
    options, pytest_arguments = parser.parse_known_args(arguments)
    tests = options.source.resolve() / "tests"
    files = [f"unit/{name}" for name in FILES if (tests / "unit" / name).is_file()]
    if not files:
        parser.error(f"--source {options.source}: none of the selected test files is below tests/unit")
    stock: dict[str, Result] = {}
    ours: dict[str, Result] = {}
    with contextlib.ExitStack() as stack:
        results = options.results or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for file in files:
            for arm, switch, found in (("stock", {}, stock), ("bucket_moo", SWITCH, ours)):
                path = results.resolve() / arm / Path(file).with_suffix(".xml")
                if not path.is_file():
                    run(tests, file, path, pytest_arguments, switch)
                found.update(read(path))
    head = describe()
    print(headline(head), table(stock, ours), sep="\n\n")
    both = {name: (result, ours.get(name, Result("failed", "no result"))) for name, result in stock.items()}
    differing = {name: ended for name, (theirs, ended) in both.items() if theirs.outcome == "passed" != ended.outcome}
    for name, ended in differing.items():
        print(f"{name}: {ended.outcome}: {ended.reason}")
    if options.out:
        report = {
            "made_by": head,
            "what": "DeepSpeed's own tests, with stock DeepSpeed and with bucket_moo (mean over one language)",
            "sha256": {file: hashlib.sha256((tests / file).read_bytes()).hexdigest() for file in files},
            "pytest_arguments": pytest_arguments,
            "counts": {file: [count(stock, file), count(ours, file)] for file in files},
            "differing": {name: dataclasses.asdict(ended) for name, ended in differing.items()},
            "tests": {name: [dataclasses.asdict(result) for result in pair] for name, pair in both.items()},
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(ended.outcome == "failed" for ended in differing.values()))


def run(tests: Path, file: str, results: Path, pytest_arguments: Sequence[str], switch: Mapping[str, str]) -> None:
    """Runs a file of tests.

    Args:
        tests: the checkout's folder of tests.
        file: relative to it.
        results: the JUnit file to write.
        switch: environment that switches bucket_moo on.

    Raises:
        RuntimeError: pytest has ended without writing its results.
    """
    path = [str(HERE / "inject"), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **ENVIRONMENT, **switch, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    command += [f"--junitxml={results}", file, *pytest_arguments]
    ended = subprocess.run(command, cwd=tests, env=environment, check=False)
    if not results.is_file():
        raise RuntimeError(f"pytest ended with {ended.returncode} and no results: {' '.join(command)}")


def read(results: Path) -> dict[str, Result]:
    """Returns what a JUnit file says of each test; of several records of a test, its teardown's say, the worst."""
    found: dict[str, Result] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        classes = case.attrib["classname"].split(".")[case.attrib["file"].count("/") + 1 :]
        name = "::".join([case.attrib["file"], *classes, case.attrib["name"]])
        problem = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            found.setdefault(name, Result("passed", ""))
            continue
        reason = reason_of(problem)
        if problem.tag == "skipped":
            found[name] = Result("skipped", reason)
        else:
            found[name] = Result("refused" if reason.startswith(REFUSED) else "failed", reason)
    return found


def reason_of(problem: ElementTree.Element) -> str:
    """Returns the first line of a test's error; of a rank's error that a test reports with its traceback, the last."""
    message = COLOUR.sub("", problem.get("message") or "").strip()
    if "Traceback (most recent call last)" in message:
        return RAISED.findall(COLOUR.sub("", problem.text or ""))[-1]
    return message.split("\n")[0]


def count(results: Mapping[str, Result], file: str) -> dict[str, int]:
    """Returns how many tests of a file, or of all where it is empty, ended in each way."""
    counts = Counter(result.outcome for name, result in results.items() if name.split("::")[0] == file or not file)
    return {each: counts[each] for each in OUTCOMES}


def table(stock: Mapping[str, Result], ours: Mapping[str, Result]) -> str:
    """Returns a table of Markdown, a line a file."""
    lines = [
        "| tests/ | stock: passed | failed | skipped | bucket_moo: passed | failed | skipped | refused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in [*dict.fromkeys(name.split("::")[0] for name in stock), ""]:
        theirs, with_ours = count(stock, file), count(ours, file)
        numbers = [theirs[each] for each in OUTCOMES[:3]] + [with_ours[each] for each in OUTCOMES]
        lines.append(f"| {file or 'all'} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
