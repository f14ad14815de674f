"""What adapters put into other people's objects: hooks that do not travel with a copy, and hooks of a backward.

A module keeps its hooks in plain dictionaries, which `copy.deepcopy`, `AveragedModel` and `torch.save` take along. A
copy of a registered model is a plain model: it is no part of the session, so a hook that was copied does nothing.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils import _pytree as pytree


class Gone:
    """What a copy has in place of something that stays with the original."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


class Stays:
    """Base of what does not travel with a copy of the model that it was put into."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Gone:
        return Gone()

    def __reduce__(self) -> tuple[Any, ...]:
        return Gone, ()


class Hook(Stays):
    """A hook that a module's dictionaries may hold: bound methods would be copied with what they are bound to."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def weak(method: Callable[[Any], None]) -> Callable[..., None]:
    """Returns a hook that does not keep the owner of a bound method alive: for global hooks of optimizers, and for
    post-accumulate-grad hooks, whose cycles Python's collector does not see."""
    reference = weakref.WeakMethod(method)

    def hook(subject: Any, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(subject)

    return hook


def after_backward(callback: Callable[[], None]) -> None:
    """Queues a callback of the backward that is running, behind those that wrappers queue in it: when backward is over
    it goes to the end of the queue once more."""
    queue_callback(lambda: queue_callback(callback))


def queue_callback(callback: Callable[[], None]) -> None:
    """Queues a callback of the backward that is running."""
    Variable._execution_engine.queue_callback(callback)


class BeforeAccumulation:
    """Hooks of parameters, called before a gradient is added to `.grad`; by `torch.autograd.grad`, which adds nothing,
    never.

    Args:
        come: a method that is called with each gradient, and returns what takes its place, or `None`. Its owner is not
            kept alive.
    """

    def __init__(self, parameters: Iterable[Tensor], come: Callable[[Tensor], Tensor | None]) -> None:
        reference = weakref.WeakMethod(come)

        def hook(gradients: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            alive = reference()
            replaced = alive(gradients[0]) if alive is not None else None
            return None if replaced is None else (replaced,)

        # Nobody else need keep these.
        self._nodes = [torch.autograd.graph.get_gradient_edge(each).node for each in parameters]
        self._handles = [node.register_prehook(hook) for node in self._nodes]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


def graph_task() -> int | None:
    """Returns the number of the backward that is running, `None` outside of one."""
    number = int(torch._C._current_graph_task_id())
    return number if number >= 0 else None


def watch(output: Any, reached: Callable[[], None]) -> None:
    """Calls `reached` when a backward comes to what a forward pass has returned.

    Args:
        output: tensors, or whatever holds them.
    """
    for tensor in tensors_of(output):
        tensor.register_hook(torch.compiler.disable(lambda gradient: reached()))


def tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors with a graph in what a forward pass has returned, whatever holds them."""
    return [tensor for tensor in _tensors(output, depth=4) if tensor.requires_grad]


def _tensors(output: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dictionaries, dataclasses and objects with attributes."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, type):
            yield from _tensors(_attributes(leaf), depth - 1)


def _attributes(leaf: Any) -> list[Any]:
    if dataclasses.is_dataclass(leaf):
        return [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    found = getattr(leaf, "__dict__", {})
    return list(found.values()) if isinstance(found, Mapping) and not isinstance(leaf, torch.nn.Module) else []
