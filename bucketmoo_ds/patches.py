"""Reaches into other people's packages: at the moment when a module is imported, and around methods, which others may
have wrapped already or wrap later."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Hook = Callable[[ModuleType], None]


def when_imported(name: str, hook: Hook) -> None:
    """Calls the hook with the module of that name as soon as its code has run: now, where it is imported already.

    What the hook raises, the import raises; the next attempt to import the module calls the hook again.
    """
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.hooks.setdefault(name, []).append(hook)


def wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Wraps a method, unless a wrapper with our mark is in the chain already, below others' or above them.

    Others may call it as a function or as a bound method, and pass on arguments as they like.

    Args:
        owner: the class whose method it is.
        name: of the method.
        wrapper: called with the bound method, the object, positional and keyword arguments.
    """
    plain, mark = inspect.getattr_static(owner, name), wrapper.__name__  # of the class, or inherited
    found = plain
    while found is not None:
        if getattr(found, "_bucket_moo_wrapper", None) == mark:
            return
        found = getattr(found, "__wrapped__", None)

    @functools.wraps(plain)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(plain.__get__(self, type(self)), self, args, kwargs)

    wrapped._bucket_moo_wrapper = mark  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


class _Finder(MetaPathFinder):
    """Finds a module that is waited for where the others find it, and calls its hooks when its code has run."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Hook]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        if fullname not in self.hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            self._notify(spec.loader, fullname)
        return spec

    def _notify(self, loader: Any, name: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == name:  # a loader may load several modules
                for hook in self.hooks.get(name, ()):
                    hook(module)
                self.hooks.pop(name, None)

        loader.exec_module = exec_module


_finder = _Finder()
