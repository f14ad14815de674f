"""Imports run downwards only: who may know what, read from the source of every file, its functions included.

    ground (errors, logs, patches, config, transfer) < ops, kernels < aggregate < comm < plan < data < pipeline
        < adapters < integrations < apps

A file may import what is below it and what lies beside it in its own folder. Beside these, `reference` knows the ground
alone, since it judges the rest; adapters know their own framework and what they share, not each other; and below
adapters nobody knows a framework.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "bucketmoo_ds"
REFERENCE = f"{PACKAGE}.reference"
RULE = f"{PACKAGE}.aggregate.Aggregator"  # the type of the rule that the reference is handed

GROUND = ("errors", "logs", "patches", "config", "transfer")
LEVELS = (
    *GROUND, "ops", "aggregate", "comm", "plan", "data", "pipeline", "adapters", "integrations", "apps",
)  # fmt: skip
FRAMEWORKS = ("deepspeed", "transformers", "accelerate", "torch.distributed.fsdp")
SHARED_BY_ADAPTERS = ("table", "micro_step", "release", "hooks", "session", "staging", "whole", "sharded", "mixed")


def sources() -> Iterator[tuple[str, str]]:
    """Yields the dotted name and the text of every module of the package."""
    for folder, package in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path.read_text(encoding="utf-8")


def imports(module: str, text: str) -> list[str]:
    """The dotted names that a module imports, anywhere in it; `from a import b` gives `a.b`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import, whose level this test does not read"
            found += [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            found += [name.value] if isinstance(name, ast.Constant) else []
    return found


def level(module: str) -> int:
    """The level of a module of ours; what the package itself shows its users stands above all."""
    name = module.split(".")[1]
    known = "ops" if name == "kernels" else name
    return LEVELS.index(known) if known in LEVELS else len(LEVELS)


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def faults(module: str, text: str) -> list[str]:
    """What a module imports and must not, each with the reason."""
    if module == PACKAGE:
        return []
    names = imports(module, text)
    ours = [name for name in names if name.startswith(f"{PACKAGE}.") and not name.startswith(f"{PACKAGE}.__")]
    if module == REFERENCE:
        allowed = [*(f"{PACKAGE}.{name}" for name in GROUND), RULE]
        return [f"reference imports {name}, which it judges" for name in ours if not within(name, allowed)]
    own = level(module)
    assert own < len(LEVELS), f"{module} stands on no level: give its folder one, here and in CONTRIBUTING.md"
    found = [f"{module} imports {name}, which judges it" for name in ours if within(name, [REFERENCE])]
    found += [
        f"{module} imports {name}, which is above it"
        for name in ours
        if level(name) > own and not within(name, [REFERENCE]) and LEVELS[own] != "apps"
    ]
    if own < LEVELS.index("adapters"):
        known = [name for name in names if within(name, FRAMEWORKS)]
        found += [f"{module} imports {name}: adapters alone know a framework" for name in known]
    if LEVELS[own] == "adapters":
        mine = ".".join(module.split(".")[:3])
        allowed = [mine, *(f"{PACKAGE}.adapters.{name}" for name in SHARED_BY_ADAPTERS)]
        others = [name for name in ours if level(name) == own and not within(name, allowed)]
        found += [f"{module} imports {name}, another adapter" for name in others]
    return found


def test_no_import_runs_upwards() -> None:
    modules = dict(sources())
    assert {f"{PACKAGE}.{name}" for name in GROUND} <= set(modules)
    found = [fault for module, text in modules.items() if module != REFERENCE for fault in faults(module, text)]
    assert not found, "\n".join(found)


def test_the_reference_shares_no_code_with_what_it_judges() -> None:
    assert not faults(REFERENCE, dict(sources())[REFERENCE])


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("ops.gram", "def f():\n    from bucketmoo_ds.plan.blocks import Bucket", "which is above it"),
        ("comm.exchange", "if TYPE_CHECKING:\n    from bucketmoo_ds import pipeline", "which is above it"),
        ("config", "import bucketmoo_ds.aggregate.mgda", "which is above it"),
        ("data.batch", "from bucketmoo_ds import BucketMOOConfig", "which is above it"),
        ("kernels.aot", "from bucketmoo_ds.apps.bench import provenance", "which is above it"),
        ("plan.blocks", 'importlib.import_module("bucketmoo_ds.adapters.table")', "which is above it"),
        ("plan.blocks", 'import_module(f"bucketmoo_ds.apps.{name}")', "which is above it"),
        ("pipeline.engine", "import torch.distributed.fsdp as fsdp", "adapters alone know a framework"),
        ("data.batch", "from torch.distributed import fsdp", "adapters alone know a framework"),
        ("adapters.ddp", "from bucketmoo_ds.adapters import single", "another adapter"),
        ("adapters.fsdp3", "from bucketmoo_ds.adapters.deepspeed.engine import BucketMOOEngine", "another adapter"),
        ("apps.bench.sweep", "from bucketmoo_ds import reference", "which judges it"),
        ("reference", "from bucketmoo_ds import aggregate", "which it judges"),
    ],
)
def test_every_kind_of_fault_is_found(module: str, line: str, expected: str) -> None:
    (fault,) = faults(f"{PACKAGE}.{module}", line)
    assert fault.endswith(expected)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops.gram", "from bucketmoo_ds.errors import ConfigError"),
        ("kernels.min_norm", "from bucketmoo_ds.ops.backends import min_norm"),
        ("plan.blocks", "import torch.distributed as dist"),
        ("pipeline.engine", "from bucketmoo_ds import aggregate, ops"),
        (
            "adapters.deepspeed.zero3",
            "import deepspeed\nfrom bucketmoo_ds.adapters.deepspeed.reduction import Reduction",
        ),
        ("adapters.ddp", "from bucketmoo_ds.adapters import session, table"),
        ("apps.cli.main", "from bucketmoo_ds import __version__, BucketMOOConfig"),
        ("reference", "import torch\nfrom bucketmoo_ds.errors import ConfigError"),
    ],
)
def test_what_is_allowed(module: str, line: str) -> None:
    assert not faults(f"{PACKAGE}.{module}", line)
