"""Covered modules: whose parameters get weighted gradients, and how each kind is known.

A covered module keeps its class in every sense but one: its class gets a subclass of the same name, made here, whose
forward goes through `uses`. A copy of the module, and one that is pickled, has its own class again.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from bucketmoo_ds.adapters.hooks import Stays
from bucketmoo_ds.adapters.mixed import uses
from bucketmoo_ds.adapters.mixed.passes import Pass, Placed
from bucketmoo_ds.errors import BucketMOOError, ConfigError

OWN = "_bucketmoo_covered"
GUARDED = "_bucketmoo_guarded"  # in the metadata of a node of the graph: no gradient may come to it
_SPLIT = (
    'module "{}": "{}" is a DTensor when the module runs, as tensor parallelism leaves it: each rank then has a part '
    "of every row, and its Gram would be one of parts. Use data parallelism (DDP, FSDP, ZeRO), or freeze the module"
)


class Driver(Protocol):
    """What a covered module asks of its session."""

    @property
    def table(self) -> Tensor:
        """See `uses.Use`."""

    @property
    def taps(self) -> Sequence[Tensor]:
        """A leaf of each block."""

    def current(self) -> Pass | None:
        """The forward pass that is running, or that is made again in backward; `None` outside of any."""

    def recomputes(self) -> bool:
        """Whether it is made again."""


@dataclasses.dataclass(eq=False)
class Covered(Stays):
    """What a covered module knows.

    Args:
        driver: the session.
        name: the module's.
        numbers: of its own trainable parameters, by their names in it, the numbers in the plan.
        blocks: by the same names, the blocks.
        forward: of its kind.

    Attributes:
        trained: of the numbers, those of the parameters that are not frozen now.
    """

    driver: Driver
    name: str
    numbers: Mapping[str, int]
    blocks: Mapping[str, int]
    forward: Kind
    trained: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @torch.compiler.disable  # a graph would keep the languages and groups of the batch that it was traced with
    def __call__(self, module: nn.Module, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module's forward."""
        if silent():
            with parameters_as(module, {name: each.detach() for name, each in held(module, self.numbers).items()}):
                return plain(*args, **kwargs)
        batch = self.driver.current()
        if batch is not None and not self.driver.recomputes():
            for number in self.numbers.values():
                batch.uses[number] = batch.uses.get(number, 0) + 1
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        there = held(module, self.numbers)
        self.trained = {name: self.numbers[name] for name, each in there.items() if each.requires_grad}
        if not self.trained:
            return plain(*args, **kwargs)
        if batch is not None:
            for name, each in there.items():
                if isinstance(each, DTensor):
                    raise ConfigError(_SPLIT.format(self.name, name))
            output = self.forward(self, batch, module, plain, args, kwargs)
            if output is not NotImplemented:
                return output
        return _guarded(plain(*args, **kwargs), self._why(batch, args))

    def use(self, name: str, batch: Pass, placed: Placed) -> uses.Use | None:
        """Returns the use of a parameter; `None` where it is not trained."""
        if name not in self.trained:
            return None
        return uses.Use(self.driver.table, self.blocks[name], self.trained[name], batch, placed)

    def tap(self, name: str, batch: Pass) -> Tensor | None:
        """Returns the tap of a parameter, where Grams are taken."""
        return self.driver.taps[self.blocks[name]] if batch.takes_grams and name in self.trained else None

    def _why(self, batch: Pass | None, args: Sequence[Any]) -> str:
        if batch is None:
            return (
                f'a backward through module "{self.name}" outside of a forward pass of the registered model: call the '
                "model that was registered, not a module inside of it"
            )
        shape = next((list(each.shape) for each in args if isinstance(each, Tensor)), None)
        return (
            f'module "{self.name}" gets rows {shape}, which are not the tokens of the micro-batch, '
            f"{list(batch.rows.languages.shape)}: nothing tells their languages. Freeze its parameters, or use the "
            "adapter of the wrapper (ddp, fsdp2, ...) with one language in a micro-batch"
        )


class Kind(Protocol):
    """The forward of a kind of module; `NotImplemented` where its rows are not those of the micro-batch."""

    def __call__(
        self, covered: Covered, batch: Pass, module: Any, plain: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any: ...


def cover(module: nn.Module, covered: Covered) -> None:
    """Gives a module the forward of its kind."""
    vars(module)[OWN] = covered
    cls: Any = type(module)
    if not any("covers" in vars(each) for each in cls.__mro__):  # a wrapper may have made its own of ours
        module.__class__ = _subclass(cls, base_of(cls))


def uncover(module: nn.Module) -> None:
    """Gives it its own class back; a wrapper that has made another class of it since keeps that, with its forward."""
    del vars(module)[OWN]
    if "covers" in vars(type(module)):
        module.__class__ = vars(type(module))["covers"]


def base_of(cls: type) -> type:
    """The class whose forward is replaced. The forward of a class derived from an embedding or a linear layer stays,
    and comes to ours by its `super().forward`."""
    return next((base for base in (nn.Linear, nn.Embedding) if issubclass(cls, base)), cls)


@functools.cache
def _subclass(cls: Any, base: Any) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        covered = vars(self).get(OWN)
        plain = functools.partial(base.forward, self)
        return plain(*args, **kwargs) if covered is None else covered(self, plain, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        state = cls.__reduce_ex__(self, protocol)[2]
        made = copyreg._reconstructor, (cls, object, None)  # type: ignore[attr-defined]  # pickle's own of old
        return *made, {name: value for name, value in state.items() if name != OWN}

    ours = type(base.__name__, (base,), {"forward": forward})
    space = {"__reduce_ex__": reduce, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "covers": cls}
    return type(cls.__name__, (ours,) if cls is base else (cls, ours), space)


# --- kinds ----------------------------------------------------------------------------------------------------------


def linear(covered: Covered, batch: Pass, module: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`nn.Linear`, and transformers' `Conv1D`, whose weight lies the other way round."""
    x = _only(args, kwargs)
    placed = batch.placed(x.shape[:-1])
    if placed is None:
        return NotImplemented
    x, weight, bias = _as_autocast(x, module.weight, module.bias)
    turned = not isinstance(module, nn.Linear)
    pair = covered.use("weight", batch, placed), covered.use("bias", batch, placed)
    return uses.Linear.apply(x, weight, bias, turned, pair, covered.tap("weight", batch), covered.tap("bias", batch))


def embedding(covered: Covered, batch: Pass, module: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`nn.Embedding`. Positions that all sequences share are looked up for each of them."""
    indices = batch.expanded(_only(args, kwargs), "position" in covered.name)
    placed = batch.placed(indices.shape)
    use = covered.use("weight", batch, placed) if placed is not None else None
    if use is None:
        return NotImplemented
    return uses.Embedding.apply(indices, module.weight, module.padding_idx, use, covered.tap("weight", batch))


def norm(covered: Covered, batch: Pass, module: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A module whose parameters, `weight` and `bias` `[d]`, multiply and add to each row: `weight * unit(x) + bias`."""
    if len(args) + len(kwargs) > 1:  # what else it adds or multiplies, nobody has tried
        return row_wise(covered, batch, module, plain, args, kwargs)
    x = _only(args, kwargs)
    placed = batch.placed(x.shape[:-1])
    if placed is None:
        return NotImplemented
    live = held(module, covered.trained)
    with parameters_as(module, {name: each.detach() for name, each in live.items()}):
        output = plain(*args, **kwargs)
    like = next(iter(live.values())).detach()
    autocast = _autocast_of(x.device.type)

    def unit(rows: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return unit_of(module, plain, set(live), like, rows)

    pair = covered.use("weight", batch, placed), covered.use("bias", batch, placed)
    taps = covered.tap("weight", batch), covered.tap("bias", batch)
    return uses.Elementwise.apply(output, live.get("weight"), live.get("bias"), x, unit, pair, *taps)


def unit_of(module: Any, plain: Callable[..., Any], names: set[str], like: Tensor, rows: Tensor) -> Tensor:
    """Returns what a norm's weight multiplies: what a weight of ones gives beyond one of zeros."""
    if getattr(plain, "func", None) is nn.LayerNorm.forward:
        return nn.functional.layer_norm(rows, module.normalized_shape, None, None, module.eps)
    others = {name: torch.zeros_like(like) for name in names}
    with parameters_as(module, {**others, "weight": torch.ones_like(like)}):
        ones = plain(rows)
    with parameters_as(module, {**others, "weight": torch.zeros_like(like)}):
        return ones - plain(rows)


def row_wise(covered: Covered, batch: Pass, module: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Any module whose output rows each depend on their input row alone. Backward makes the outputs once more, for the
    parameters' sake."""
    trained = covered.trained
    live = list(held(module, trained).values())
    random = _random_of(live[0].device)
    with parameters_as(module, dict(zip(trained, (each.detach() for each in live), strict=True))):
        output = plain(*args, **kwargs)
    leaves, form = pytree.tree_flatten(output)
    wanted = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    rows = [batch.placed(leaves[place].shape[:-1]) for place in wanted]
    found = [each for each in rows if each is not None]
    if not found or len(found) < len(rows):
        return NotImplemented
    inputs, inputs_form = pytree.tree_flatten((args, kwargs))
    kept = [each.detach() if isinstance(each, Tensor) else each for each in inputs]
    autocast = _autocast_of(leaves[wanted[0]].device.type)

    def again() -> tuple[list[Tensor], list[Tensor]]:
        own = [each.detach().requires_grad_() for each in held(module, trained).values()]
        positional, named = pytree.tree_unflatten(kept, inputs_form)
        with parameters_as(module, dict(zip(trained, own, strict=True))), autocast(), random(), _silence():
            made = pytree.tree_flatten(plain(*positional, **named))[0]
        return [made[place] for place in wanted], own

    uses_of = [covered.use(name, batch, found[0]) for name in trained]
    taps = [tap for name in trained if (tap := covered.tap(name, batch)) is not None]
    outputs = [leaves[place] for place in wanted]
    made = uses.RowWise.apply(again, uses_of, found, len(live), *live, *taps, *outputs)
    for place, each in zip(wanted, made, strict=True):
        leaves[place] = each
    return pytree.tree_unflatten(leaves, form)


def _only(args: Any, kwargs: Any) -> Any:
    """The argument of a module that has one."""
    return args[0] if args else next(iter(kwargs.values()))


# --- what kinds are made of -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def parameters_as(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module's parameters are these tensors; by whatever means a wrapper has put them there.

    Args:
        values: by their names in it, which lead into the dictionaries and lists of parameters that it holds.
    """
    within: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        within.setdefault(path, {})[attribute] = value
    restored = []
    for path, own in within.items():
        owner = module.get_submodule(path)
        hidden = {name: vars(owner).pop(name) for name in own if name in vars(owner)}
        restored.append((owner, owner._parameters, hidden))
        before = {name: owner._parameters[name] for name in owner._parameters}
        for name, value in own.items():  # ZeRO-3 reads its marks when it looks ahead from a module inside
            marks = getattr(before.get(name), "__dict__", {})
            vars(value).update({mark: each for mark, each in marks.items() if mark.startswith("ds_")})
        vars(owner)["_parameters"] = {**before, **own}
    try:
        yield
    finally:
        for owner, parameters, hidden in restored:
            vars(owner)["_parameters"] = parameters
            vars(owner).update(hidden)


def held(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns a module's parameters by their names in it."""
    return {name: operator.attrgetter(name)(module) for name in names}


_silent = [False]


def silent() -> bool:
    """Whether a module inside of a row-wise one is called for the sake of the other's parameters."""
    return _silent[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    _silent[0], before = True, _silent[0]
    try:
        yield
    finally:
        _silent[0] = before


def _as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype in which autocast would multiply them."""
    kind = next(each.device.type for each in tensors if each is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [each.to(dtype) if each is not None and each.is_floating_point() else each for each in tensors]


def _autocast_of(kind: str) -> Callable[[], Any]:
    """What enters the state of autocast that holds now."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _random_of(device: torch.device) -> Callable[[], Any]:
    """What enters the state of the random generators that holds now."""
    others = [] if device.type == "cpu" else [device]
    states = torch.get_rng_state(), [torch.get_device_module(each).get_rng_state(each) for each in others]

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with torch.random.fork_rng(others, device_type=device.type):
            torch.set_rng_state(states[0])
            for each, state in zip(others, states[1], strict=True):
                torch.get_device_module(each).set_rng_state(state, each)
            yield

    return entered


def _guarded(output: Any, why: str) -> Any:
    """The output, which no gradient may come to."""

    def refuse(gradient: Tensor) -> None:
        raise BucketMOOError(why)

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(refuse)
            if leaf.grad_fn is not None:
                leaf.grad_fn.metadata[GUARDED] = True  # type: ignore[index]
    return output


def probe(module: nn.Module, plain: Callable[..., Any], size: int) -> bool:
    """Whether a module is a norm in the sense of `norm`: tried on random rows and parameters."""
    clone = copy.copy(module)
    trained = [name for name, each in module._parameters.items() if each is not None]
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    values = {name: draw(size) for name in trained}
    rows = draw(1, 4, size)
    other = torch.cat([draw(1, 1, size), rows[:, 1:]], dim=1)
    with torch.no_grad(), parameters_as(clone, values):
        output, changed = plain(clone, rows), plain(clone, other)
    with torch.no_grad():
        unit = unit_of(clone, functools.partial(plain, clone), set(trained), values["weight"], rows)
        with parameters_as(clone, {**values, "weight": torch.zeros(size)}):
            rest = plain(clone, rows)
    close = functools.partial(torch.allclose, rtol=1e-2, atol=1e-2)  # modules may round to 16 bits inside
    expected = values["weight"] * unit + rest
    biased = rest - values["bias"] if "bias" in values else rest
    return (
        isinstance(output, Tensor)
        and output.shape == rows.shape
        and close(output, expected)
        and close(output[:, 1:], changed[:, 1:])
        and close(biased, biased[:, :1].expand_as(biased)) | ("bias" not in values)
    )
