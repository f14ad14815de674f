"""That no trained parameter meets the rows of a pass anywhere but in the forward of a covered module.

A model may use a parameter without its module, such as `functional.linear(x, self.embedding.weight)`; its gradient
would be an average there. The graph of the first forward pass shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter

from bucketmoo_ds.adapters.mixed import modules, uses
from bucketmoo_ds.errors import BucketMOOError

# Of each use's tensors, how many at their beginning are rows and no parameters.
_ROWS = {uses.Linear.__name__: 1, uses.Embedding.__name__: 0, uses.Elementwise.__name__: 1}


def check(outputs: Iterable[Tensor], is_trained: Callable[[Tensor], str | None]) -> None:
    """Follows the graph of what a forward pass has returned.

    Args:
        outputs: those that have a graph.
        is_trained: returns the name of a trained parameter, and `None` for any other leaf.

    Raises:
        BucketMOOError: a trained parameter was reached outside of a use.
    """
    left: list[Any] = [each.grad_fn for each in outputs if each.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            name = is_trained(leaf) or ("of a FlatParameter" if isinstance(leaf, FlatParameter) else None)
            if name is not None:
                raise BucketMOOError(
                    f'parameter "{name}" is used outside of its own module\'s forward, where its gradient would be an '
                    "average of all languages: call the module, freeze the parameter, or feed one language in a "
                    "micro-batch to the adapter of the wrapper (single, ddp, fsdp1, fsdp2)"
                )
            continue
        for following in _edges(node):
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)


def _edges(node: Any) -> list[Any]:
    """What comes after a node: of a use only its rows, and nothing where no gradient may come. Covered modules are in
    no compiled part."""
    if modules.GUARDED in node.metadata:
        return []
    name = node.name().removesuffix("Backward")
    edges = [following for following, _ in node.next_functions]
    if name == uses.RowWise.__name__:
        return edges[-len(node.rows) :]  # its outputs; parameters and taps come before
    if name in _ROWS:
        return edges[: _ROWS[name]]
    return edges


def names_of(model: nn.Module) -> dict[int, str]:
    """Returns the names of a model's trained parameters by identity."""
    return {id(each): name for name, each in model.named_parameters() if each.requires_grad}
