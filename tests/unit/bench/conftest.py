"""One thread: on a machine whose cores are all taken, two that wait for each other take seconds for a tiny product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bucketmoo_ds.apps.bench.sweep import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield
