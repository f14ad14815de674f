"""`bucketmoo doctor`: what is installed, which backend will run, what is missing and how to get it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bucketmoo_ds import __version__, ops
from bucketmoo_ds.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, whether all is well, and what to do if not."""

    what: str
    found: str
    well: bool
    way_out: str = ""


# (package, what it is for, how to get it); the first is needed, the others open a feature.
PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("deepspeed", "the DeepSpeed adapter", "pip install 'bucketmoo-ds[deepspeed]'; torch's wrappers do without"),
    ("transformers", "train, quickstart", "pip install 'bucketmoo-ds[train]', in a clone: '.[train]'"),
    ("datasets", "train, quickstart", "pip install 'bucketmoo-ds[train]', in a clone: '.[train]'"),
    ("matplotlib", "report", "pip install 'bucketmoo-ds[train]', in a clone: '.[train]'"),
)
NEEDED = ("torch",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds no arguments."""


def run(options: argparse.Namespace) -> None:
    """Prints the findings; raises `ConfigError` where something needed is missing."""
    findings = examine()
    table = Table("", "what", "found", "what to do", title=f"bucketmoo_ds {__version__}")
    for finding in findings:
        # An extra's brackets are no markup.
        table.add_row("ok" if finding.well else "--", *map(escape, (finding.what, finding.found, finding.way_out)))
    Console().print(table)
    missing = [finding for finding in findings if not finding.well and finding.what.split()[0] in NEEDED]
    if missing:
        raise ConfigError("; ".join(f"{finding.what}: {finding.way_out}" for finding in missing))


def examine() -> list[Finding]:
    """Returns the findings, in the order in which they are shown."""
    findings = [Finding("Python", platform.python_version(), True)]
    findings += [_package(name, purpose, way_out) for name, purpose, way_out in PACKAGES]
    if findings[1].well:
        findings += [_accelerator(), *_backends()]
    if findings[2].well:
        findings += [_seams(), _extension_locks()]
    findings.append(_compiler())
    apt = shutil.which("apt-get") is not None
    way_out = "" if apt else "the quickstart uses Django's messages, or your own text: --data FOLDER"
    findings.append(Finding("apt-get (text of the quickstart)", "yes" if apt else "no", apt, way_out))
    return findings


def _package(name: str, purpose: str, way_out: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(f"{name} ({purpose})", "not installed", False, way_out)
    return Finding(f"{name} ({purpose})", importlib.metadata.version(name), True)


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("accelerator", ", ".join(names), True)
    return Finding("accelerator", f"none; CPU with {os.cpu_count()} cores", True, "runs on the CPU, over gloo")


def _backends() -> list[Finding]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = f" ({ops.ENVIRONMENT})" if os.environ.get(ops.ENVIRONMENT) else ""
    try:
        chosen = ops.choose_backend("auto", device)
        slow = chosen == "reference" and not source
        way_out = "slow: it is there to be read; below is why no other runs" if slow else ""
        findings = [Finding(f"backend of the ops on {device}", f"{chosen}{source}", not slow, way_out)]
    except ConfigError as error:
        findings = [Finding(f"backend of the ops on {device}", os.environ[ops.ENVIRONMENT], False, str(error))]
    for name in ops.BACKENDS:
        reason = ops.why_unavailable(name, device)
        findings.append(Finding(f"  {name}", f"no: {reason}" if reason else "yes", True))
    return findings


def _seams() -> Finding:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from bucketmoo_ds.adapters.deepspeed.seams import check_seams

    try:
        check_seams(deepspeed.__version__, DeepSpeedEngine, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    except ConfigError as error:
        return Finding("deepspeed's seams for ZeRO", "changed", False, str(error))
    return Finding("deepspeed's seams for ZeRO", "as expected", True)


def _extension_locks() -> Finding:
    from bucketmoo_ds.adapters.deepspeed.extension_locks import describe_old_locks

    found = describe_old_locks()
    return Finding("locks of torch's extension builds", f"{len(found)} old", not found, "; ".join(found))


def _compiler() -> Finding:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    way_out = "" if found else "DeepSpeed compiles its fused optimizers with one; torch's optimizers need none"
    return Finding("C++ compiler", found or "none", found is not None, way_out)
