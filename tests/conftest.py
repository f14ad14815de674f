"""The seed of a run stands at its head."""

from __future__ import annotations

from draw import SEED


def pytest_report_header() -> str:
    return f"BUCKETMOO_TEST_SEED={SEED}"
