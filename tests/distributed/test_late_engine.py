"""An engine whose JSON asks for bucket_moo, made before the package was imported, stops instead of averaging."""

from __future__ import annotations

import launch
import pytest


@pytest.fixture(scope="module")
def outcome() -> dict[str, list[str]]:
    (found,) = launch.launch("late_engine.py", 1, [])
    assert found.result is not None, found.output[-4000:]
    return found.result


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ("asked for", '"bucket_moo" in its JSON was not read'),
        ("misspelt", '"bucketmoo": not a DeepSpeed setting; did you mean "bucket_moo"?'),
        ("invalid", "bucket_moo.languages = []"),
    ],
)
def test_an_engine_that_was_to_resolve_conflicts_trains_no_more(
    outcome: dict[str, list[str]], entries: str, named: str
) -> None:
    for raised in outcome[entries]:
        assert raised.startswith("BucketMOOError: this DeepSpeed engine averages")
        assert named in raised
        assert "Import bucketmoo_ds before deepspeed.initialize" in raised


@pytest.mark.parametrize("entries", ["off", "plain"])
def test_others_train_on(outcome: dict[str, list[str]], entries: str) -> None:
    assert outcome[entries] == ["", ""]
