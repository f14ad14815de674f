"""Runs a part of the tests on other versions than the pinned ones, and writes down what came of it.

    python benchmarks/versions.py deepspeed|torch|transformers|python [FILE ...]

runs, with the interpreter that it is started with, the files of tests below that touch that package, or those of them
that are named, and puts the outcome under the version it finds into `benchmarks/results/<package>-versions.json`; other
outcomes there stay. `benchmarks/readme.py` makes the table of docs/compatibility.md from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bucketmoo_ds.apps.bench.provenance import describe, headline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIXED = ("unit/mixed", "distributed/test_mixed_wrappers.py")
FILES = {
    "deepspeed": (
        "unit/test_refusals.py",
        "distributed/test_stages_agree.py",
        "distributed/test_reference_parity.py",
        "distributed/test_off_is_plain.py",
        "distributed/test_checkpoint_resume.py",
    ),
    "torch": (
        "unit/test_build.py",
        "unit/test_backend_choice.py",
        "unit/test_ops.py",
        "unit/test_ops_accumulate.py",
        "unit/test_min_norm.py",
        "unit/aggregate",
        "unit/test_exchange.py",
        "unit/test_streams.py",
        "unit/test_micro_step.py",
        "unit/test_release.py",
        "unit/test_session.py",
        "unit/test_single.py",
        "unit/test_copies.py",
        "unit/test_passes_that_do_not_train.py",
        "unit/test_sampler.py",
        "distributed/test_wrapper_parity.py",
        "distributed/test_wrappers_contract.py",
        "distributed/test_wrapper_bytes.py",
        *MIXED,
    ),
    "transformers": (
        "unit/test_trainer_loss.py",
        "unit/test_documents.py",
        "unit/mixed",
        "distributed/test_accelerate.py",
        "distributed/test_mixed_trainer.py",
    ),
    "python": (
        "unit/aggregate",
        "unit/corpus",
        "unit/mixed",
        "unit/monitor",
        "unit/training",
        "unit/test_config.py",
        "unit/test_ops_accumulate.py",
        "unit/test_packaging.py",
        "unit/test_plan_command.py",
        "unit/test_sampler.py",
        "unit/test_session.py",
        "unit/test_single.py",
        "distributed/test_wrappers_contract.py",
    ),
}
OUTCOMES = ("passed", "failed", "skipped")


def main() -> None:
    """Runs the files one by one, each for ten minutes at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=sorted(FILES))
    parser.add_argument("file", nargs="*", help="of those that touch the package; all of them by default")
    options = parser.parse_args()
    package = options.package
    version = platform.python_version() if package == "python" else metadata.version(package)
    seed = random.SystemRandom().randrange(1, 10**6)
    head = describe(("torch", "triton", "numpy", "transformers", "accelerate", "trl", "peft", "deepspeed"))
    found = {file: {"seed": seed} | outcome(file, seed) for file in options.file or FILES[package]}
    path = RESULTS / f"{package}-versions.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[version] = head | {"files": known.get(version, {}).get("files", {}) | found}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def outcome(file: str, seed: int) -> dict[str, Any]:
    """Returns how many tests of a file or folder passed, failed and were skipped, and what each failure said."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not nightly", f"--junit-xml={report}"]
        environment = os.environ | {"BUCKETMOO_TEST_SEED": str(seed)}
        try:
            subprocess.run([*command, f"tests/{file}"], cwd=ROOT, env=environment, check=False, timeout=600)
        except subprocess.TimeoutExpired:
            return {"passed": 0, "failed": 1, "skipped": 0, "failures": {file: "more than ten minutes"}}
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts = dict.fromkeys(OUTCOMES, 0)
    failures = {}
    for case in cases:
        said = next((each for each in case if each.tag in ("failure", "error")), None)
        skipped = any(each.tag == "skipped" for each in case)
        counts["failed" if said is not None else "skipped" if skipped else "passed"] += 1
        if said is not None:
            failures[f"{case.get('classname')}::{case.get('name')}"] = (said.get("message") or "").split("\n")[0][:300]
    return counts | {"failures": failures, "seconds": round(time.monotonic() - began, 1)}


def render(result: dict[str, Any]) -> str:
    """Returns a table with a row for every file of tests and a column for every version."""
    versions = sorted(result, key=lambda version: [int(part) for part in version.split("+")[0].split(".")])
    files = list(dict.fromkeys(file for version in versions for file in result[version]["files"]))
    lines = [
        "Passed / failed / skipped.",
        "",
        f"| tests | {' | '.join(versions)} |",
        "| --- |" + " --- |" * len(versions),
    ]
    for file in files:
        found = (result[version]["files"].get(file) for version in versions)
        cells = (" / ".join(str(each[name]) for name in OUTCOMES) if each else "" for each in found)
        lines.append(f"| {file} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* {version}: {headline(result[version])}" for version in versions)])


if __name__ == "__main__":
    main()
