"""The seed of a run stands at its head, and its processes share what the first one compiled."""

from __future__ import annotations

import os
import sys

from draw import SEED

# Hundreds of processes import the package, whose bytecode each would make anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_report_header() -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}"
