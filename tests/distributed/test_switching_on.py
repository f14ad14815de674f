"""An engine whose JSON has the section resolves conflicts, or says why not, whoever else has wrapped DeepSpeed."""

from __future__ import annotations

import itertools
from typing import Any

import launch
import pytest

WRAPPERS = (None, "with_wrapt", "with_functools", "without_a_trace")
WAYS = ("config", "config_params", "bm.initialize", "keyword", "position")


def case(before: str | None, after: str | None, how: str, section: bool = True) -> dict[str, Any]:
    return {"before": before, "after": after, "how": how, "section": section}


CASES = [
    *(case(before, after, "config") for before, after in itertools.product(WRAPPERS, WRAPPERS)),
    *(case(before, before, how) for how in WAYS[1:] for before in (None, "without_a_trace")),
    case("with_wrapt", "without_a_trace", "position", section=False),
    case(None, None, "subclass", section=False),
    case(None, "with_wrapt", "subclass"),
]


@pytest.fixture(scope="module")
def outcomes() -> list[list[Any]]:
    return launch.run("switch_on.py", 1, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, each.values())) for each in CASES])
def test_the_section_is_never_missed(outcomes: list[list[Any]], number: int) -> None:
    (found,) = outcomes[number]
    if not CASES[number]["section"]:
        kind = "Subclass" if CASES[number]["how"] == "subclass" else "DeepSpeedEngine"
        assert found == {"type": kind, "resolves": False}
    elif CASES[number]["how"] == "subclass":
        assert found["error"] == "ConfigError"
        assert "DeepSpeed built Subclass" in found["message"]
    else:
        assert found == {"type": "BucketMOOEngine", "resolves": True}
