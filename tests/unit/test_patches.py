"""Hooks of imports, and wrappers of methods among other people's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bucketmoo_ds.patches import _finder, when_imported, wrap

NAME = "a_module_of_somebody_else"


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{NAME}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop(NAME, None)
    _finder.hooks.pop(NAME, None)


def test_hooks_are_called_in_turn_when_the_code_has_run_and_once() -> None:
    found: list[tuple[str, int]] = []
    for name in "ab":
        when_imported(NAME, lambda module, name=name: found.append((name, module.value)))  # type: ignore[misc]
    assert importlib.util.find_spec(NAME) is not None  # as others ask whether it is installed
    assert not found
    module = importlib.import_module(NAME)
    assert found == [("a", 1), ("b", 1)]
    when_imported(NAME, lambda module: found.append(("c", module.value)))
    assert found[2:] == [("c", 1)]
    importlib.reload(module)
    assert len(found) == 3


def test_what_a_hook_raises_stops_every_import() -> None:
    def refuse(module: ModuleType) -> None:
        raise RuntimeError(f"not with {module.__name__}")

    when_imported(NAME, refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"not with {NAME}"):
            importlib.import_module(NAME)
        assert NAME not in sys.modules


def test_what_is_not_there_stays_so() -> None:
    when_imported("a_module_of_nobody", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="a_module_of_nobody"):
        importlib.import_module("a_module_of_nobody")
    del _finder.hooks["a_module_of_nobody"]


def test_a_method_is_wrapped_once_below_others_wrappers_or_above() -> None:
    class Theirs:
        def method(self, value: int) -> int:
            return value + 1

    def ours(wrapped: Any, theirs: Theirs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        assert isinstance(theirs, Theirs)
        return 10 * wrapped(*args, **kwargs)

    def doubled(method: Any) -> Any:
        return functools.wraps(method)(lambda self, value: method(self, 2 * value))

    Theirs.method = doubled(Theirs.method)  # type: ignore[method-assign]
    wrap(Theirs, "method", ours)
    Theirs.method = doubled(Theirs.method)  # type: ignore[method-assign]
    wrap(Theirs, "method", ours)
    assert Theirs().method(3) == 10 * (4 * 3 + 1)


def test_an_inherited_method_is_wrapped_in_the_class_that_was_named() -> None:
    class Base:
        def method(self) -> int:
            return 1

    class Theirs(Base):
        """Inherits it."""

    wrap(Theirs, "method", lambda wrapped, theirs, args, kwargs: 10 * wrapped(*args, **kwargs))
    assert (Theirs().method(), Base().method()) == (10, 1)
