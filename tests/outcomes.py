"""What came of the cases of a worker script: each world size is launched once, with the cases that tests ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import launch
import pytest
from draw import SEED, Case, Key

Results = list[dict[str, Any]]  # of all ranks


class Outcomes(dict[Key, Results]):
    """The results of a case by its key. The first that is asked for starts its world size, with all cases of that size
    that tests of this module have as their parameter `key`; so one test by itself starts one case.

    Args:
        request: of the fixture.
        script: a worker that uses `worker.serve`.
        cases: its arguments.
        also: keys that tests ask for without a parameter.
        timeout: of a world size, in seconds.
    """

    def __init__(
        self,
        request: pytest.FixtureRequest,
        script: str,
        cases: Mapping[Key, Case],
        *,
        also: Iterable[Key] = (),
        timeout: float = 300,
    ) -> None:
        super().__init__()
        self.script, self.cases, self.timeout = script, cases, timeout
        tests = [item for item in request.session.items if item.path == request.path]
        self.wanted = {item.callspec.params.get("key") for item in tests if hasattr(item, "callspec")} | set(also)
        print(f"BUCKETMOO_TEST_SEED={SEED}")

    def __missing__(self, key: Key) -> Results:
        keys = [each for each in self.cases if each[0] == key[0] and (each in self.wanted or each == key)]
        found = launch.run(self.script, key[0], [self.cases[each] for each in keys], self.timeout)
        self.update(zip(keys, found, strict=True))
        return self[key]

    def write(self, variable: str, summary: Callable[[Any], Any]) -> None:
        """Writes the summary of all cases to the file that a variable of the environment names, if it does and all have
        run."""
        target = os.environ.get(variable)
        if target and len(self) == len(self.cases):
            Path(target).write_text(json.dumps(summary(self), indent=1) + "\n", encoding="utf-8")

    def explain(self, key: Key) -> str:
        return f"BUCKETMOO_TEST_SEED={SEED}, {key[0]} ranks, {self.cases[key]}"
