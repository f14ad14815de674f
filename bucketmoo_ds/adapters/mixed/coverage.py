"""Which trained parameter belongs to a module of which kind: every one is accounted for, or the model is refused."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from bucketmoo_ds.adapters.mixed import modules
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.plan.blocks import Parameter, plain_name

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

# Classes that users have declared, and those of libraries that were read, by name.
_declared: set[type] = set()
ROW_WISE = frozenset(
    {
        "peft.tuners.ia3.layer.Linear",
        "peft.tuners.lora.dora.DoraLinearLayer",
        "peft.tuners.lora.layer.Embedding",
        "DeepseekV2Experts",
        "DeepseekV2TopkRouter",
        "DeepseekV3Experts",
        "DeepseekV3TopkRouter",
        "Ernie4_5_MoeExperts",
        "Ernie4_5_MoeTopKRouter",
        "Glm4MoeExperts",
        "Glm4MoeTopkRouter",
        "GptOssExperts",
        "GptOssTopKRouter",
        "GraniteMoeExperts",
        "GraniteMoeTopKRouter",
        "Lfm2MoeExperts",
        "Lfm2MoeTopKRouter",
        "MiniMaxExperts",
        "MiniMaxTopKRouter",
        "MixtralExperts",
        "MixtralTopKRouter",
        "OlmoeExperts",
        "OlmoeTopKRouter",
        "PhimoeExperts",
        "PhimoeTopKRouter",
        "Qwen2MoeExperts",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeExperts",
        "Qwen3MoeTopKRouter",
        "Qwen3NextExperts",
        "Qwen3NextTopKRouter",
    }
)

# Modules of peft that make the virtual tokens of one sequence, which all sequences then get a copy of.
SHARED = frozenset(
    {
        "peft.tuners.cpt.model.CPTEmbedding",
        "peft.tuners.multitask_prompt_tuning.model.MultitaskPromptEmbedding",
        "peft.tuners.p_tuning.model.PromptEncoder",
        "peft.tuners.prompt_tuning.model.PromptEmbedding",
    }
)


def row_wise(cls: ModuleClass) -> ModuleClass:
    """Declares that each output row of a module class depends on its input row alone, so that mixed languages can be
    resolved in its parameters: for modules of one's own, before `register`. Usable as a decorator.

    Rows are what precedes the last dimension of floating outputs; they must be those of the micro-batch. Backward
    computes such a module's forward once more.
    """
    _declared.add(cls)
    return cls


@dataclasses.dataclass(frozen=True)
class Found:
    """A module with trained parameters of its own.

    Args:
        name, module: of the model.
        kind: its forward.
        numbers: by name in the module, the numbers of its trained parameters among the model's.
    """

    name: str
    module: nn.Module
    kind: modules.Kind
    numbers: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """All trained parameters, in the model's order, tied ones once, and the modules that use them."""

    model: nn.Module
    parameters: list[Parameter]
    found: list[Found]

    def frozen(self) -> list[str]:
        """Returns the parameters that have been frozen since the model was registered: they get no gradient, and their
        blocks wait for them.

        Raises:
            BucketMOOError: a parameter is trained that was not, or has a gradient hook; or a module has been replaced.
        """
        known = {each.name for each in self.parameters}
        trained = set()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained.add(plain_name(name))
                if problem := _hooked(name, parameter):
                    raise BucketMOOError(problem)
            # FSDP1 may hide parameters in one, whose modules are still the model's.
            if parameter.requires_grad and plain_name(name) not in known and not name.endswith("_flat_param"):
                raise BucketMOOError(
                    f'parameter "{name}" is trained, and was not when the model was registered, so that its gradient '
                    "would be an average of all languages: unfreeze and add parameters first, and register then"
                )
        there = set(map(id, self.model.modules()))
        for each in self.found:
            if id(each.module) not in there:
                raise BucketMOOError(
                    f'module "{each.name}" has been replaced since the model was registered, and the gradient of the '
                    "new one would be an average of all languages: replace modules first, and register then"
                )
        return sorted(known - trained)

    def describe(self) -> str:
        """Returns how many parameters each kind of module has: each parameter is counted once."""
        counted: collections.Counter[str] = collections.Counter()
        seen: set[int] = set()
        for each in self.found:
            fresh = set(each.numbers.values()) - seen
            counted[each.kind.__name__.replace("_", "-")] += len(fresh)  # type: ignore[attr-defined]
            seen |= fresh
        kinds = ", ".join(f"{count} of {kind} modules" for kind, count in counted.items() if count)
        return f"{len(self.parameters)} trained parameters: {kinds}"


def of_model(model: nn.Module) -> Coverage:
    """Finds the modules of a model.

    Raises:
        ConfigError: there is no trained parameter, one has a gradient hook, or a module whose rows might not be
            independent has some; the message names the modules.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise ConfigError("mixed.register: the model has no trainable parameter")
    for problem in filter(None, itertools.starmap(_hooked, trained.items())):
        raise ConfigError(problem)
    number = {each: index for index, each in enumerate(trained.values())}
    found, refused, unknown = [], [], []
    holders = (nn.ParameterDict, nn.ParameterList)
    taken: set[nn.Module] = set()
    shared = [name for name, module in model.named_modules() if _path_of(type(module)) in SHARED]
    for name, module in model.named_modules():
        parts = [("", module)]
        if _is_row_wise(type(module)):  # its forward is what uses them
            parts += [(f"{name}.", each) for name, each in module.named_children() if isinstance(each, holders)]
            taken.update(each for _, each in parts[1:])
        own = {
            prefix + attribute: number[each]
            for prefix, part in parts
            for attribute, each in part.named_parameters(recurse=False, remove_duplicate=False)
            if each in number
        }
        if not own or module in taken:
            continue
        kind = _rows_of_others(name, shared) or _kind(module, own)
        if isinstance(kind, str):
            unknown.append((module, own, f'"{name}" ({type(module).__name__}{kind})'))
        else:
            found.append(Found(plain_name(name), module, kind, own))
    multiplied = {one.numbers.get("weight") for one in found if one.kind in (modules.linear, modules.embedding)}
    for one in found:
        if one.kind is modules.row_wise and multiplied & set(one.numbers.values()):
            refused.append(f'"{one.name}" ({type(one.module).__name__}, which shares a matrix with a module of a kind)')
    used = {each for one in found for each in one.numbers.values()}
    for module, own, what in unknown:  # it may only hold what a module of a kind uses, as BERT's heads do
        names = type(module).forward.__code__.co_names if inspect.isfunction(type(module).forward) else tuple(own)
        if not set(own.values()) <= used or set(own) & set(names):
            refused.append(what)
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise ConfigError(
            f"mixed.register: module {', '.join(refused[:3])}{more}: nothing tells that a row of its output depends on "
            "one row of its input alone, so that the gradients of its parameters could be told apart by language. "
            "Freeze its parameters; declare its class with bucketmoo_ds.mixed.row_wise if it is so; or feed one "
            "language in a micro-batch to the adapter of the wrapper (single, ddp, fsdp1, fsdp2, or DeepSpeed with "
            'mode "auto")'
        )
    numels = {name: int(getattr(each, "ds_numel", each.numel())) for name, each in trained.items()}  # whole ones
    return Coverage(model, [Parameter(plain_name(name), numel) for name, numel in numels.items()], found)


def _is_row_wise(cls: type) -> bool:
    return any(base in _declared for base in cls.__mro__) or cls.__name__ in ROW_WISE or _path_of(cls) in ROW_WISE


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _hooked(name: str, parameter: Tensor) -> str:
    """Why a gradient hook of a parameter keeps mixed languages from being resolved; empty where it has none."""
    if not parameter._backward_hooks:
        return ""
    return (
        f'parameter "{name}" has a gradient hook (register_hook), which sees the combined gradient and not the '
        "languages' own, nor do their Grams see it: freeze what it masks; where it only watches, take "
        "register_post_accumulate_grad_hook; or feed one language in a micro-batch to the adapter of the wrapper "
        '(single, ddp, or DeepSpeed with mode "auto")'
    )


def _rows_of_others(name: str, shared: list[str]) -> str:
    """Why the rows of a module are not those of the micro-batch, whatever they look like; empty where they may be.

    Args:
        shared: the names of modules that make virtual tokens.
    """
    if "relative" in name.rpartition(".")[2]:
        return ", whose rows are pairs of tokens"
    if any(name.startswith(f"{each}.") for each in shared):
        return ", in a prompt that all sequences share; of peft's prompts, prefix tuning works"
    return ""


def _kind(module: nn.Module, own: dict[str, int]) -> modules.Kind | str:
    """The kind of a module, or what keeps it from being of any."""
    cls = type(module)
    if _is_row_wise(cls):
        return modules.row_wise
    if "forward" in vars(module):
        return ", whose forward somebody has replaced"
    conv1d = cls.__name__.endswith("Conv1D") and cls.__module__.startswith("transformers.")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return ", whose weight nn.MultiheadAttention uses without its forward"
    plain = set(own) <= {"weight", "bias"}  # and not what a parametrization makes them of
    if plain and (conv1d or (isinstance(module, nn.Linear) and _through_base(cls))):
        return modules.linear
    if plain and isinstance(module, nn.Embedding) and _through_base(cls):
        odd = {"sparse": module.sparse, "max_norm": module.max_norm, "scale_grad_by_freq": module.scale_grad_by_freq}
        return ", with " + " and ".join(name for name in odd if odd[name]) if any(odd.values()) else modules.embedding
    return modules.norm if _looks_like_norm(module, own) else ""


def _through_base(cls: type) -> bool:
    """Whether a class's forward is that of `modules.base_of`, or calls it and uses parameters nowhere else."""
    above = cls.__mro__[: cls.__mro__.index(modules.base_of(cls))]
    forwards = [vars(each)["forward"] for each in above if "forward" in vars(each)]
    forwards = [each for each in forwards if each.__module__ != modules.__name__]  # an earlier session's
    try:
        texts = [inspect.getsource(each) for each in forwards]
    except (OSError, TypeError):
        return False
    return all("super().forward(" in each and not _USED.search(each) for each in texts)


_USED = re.compile(r"self\.(weight|bias)\b(?!\.(dtype|device)\b)")
_NORM = re.compile("Norm$")


def _looks_like_norm(module: nn.Module, own: dict[str, int]) -> bool:
    """Whether a module multiplies each row by a weight and adds a bias; tried where its name says that it is a norm."""
    named = any(_NORM.search(cls.__name__) for cls in type(module).__mro__)
    if not named or isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    there: dict[str, Tensor] = {name: each for name, each in module._parameters.items() if each is not None}
    if not set(there) <= {"weight", "bias"} or "weight" not in there or list(module.children()):
        return False
    shapes = {tuple(getattr(each, "ds_shape", each.shape)) for each in there.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        return False
    plain: Callable[..., Any] = type(module).forward
    try:
        return modules.probe(module, plain, next(iter(shapes))[0])
    except (RuntimeError, TypeError, AttributeError):
        return False
