"""Which of its inputs a model reads to keep the documents of a packed sequence apart.

A document mask that the model does not obey is none: gradients would cross documents, unseen. Below is what the models
of transformers obey, read in 4.57, 5.23 and 5.24; `tests/unit/test_documents.py` perturbs one document and looks at the
next.

    position_ids that restart   `find_packed_sequence_indices` makes the mask from them, in batches of any size, under
                                eager, sdpa and flex attention, if there is no attention_mask and *no cache*. With
                                `use_cache`, which most configurations set, a forward pass that trains makes one too,
                                unless it is checkpointed. Flash attention reads them in a batch of one row alone,
                                cache or not, and cuts where the lowest position stands. (Under an attention_mask of
                                ones as well, but whether it is one of ones is not known without a wait.) Models that
                                make their masks without position_ids never obey them, which their source tells: BLOOM,
                                Falcon, OPT, XGLM, GPT-OSS, and those that attend both ways.
    cu_seq_lens_q               flash attention, beside cu_seq_lens_k, max_length_q and max_length_k, if there is no
                                attention_mask
    attention_mask [B, 1, S, S] of 0 and minus infinity: all but flash attention. Of truth values: sdpa; eager and flex
                                attention add them to the scores. In transformers 4 models that make their masks
                                without position_ids read it otherwise, or not at all
    attention_mask [B, S]       0 is padding and anything else is not. Numbers of documents (1 1 2 2 2 0) are obeyed by
                                models that were *patched* for it alone; that is taken at its word
    BlockMask                   flex attention; as it does not say which documents it keeps apart, `seq_idx` has to

A model that is not transformers' is taken at its word.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bucketmoo_ds.data.batch import virtual_tokens

_MASKED_BY_POSITION = ("eager", "sdpa", "flex_attention")
_OF_A_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Attention:
    """What a model reads. Settings that may change are read when they are asked for.

    Args:
        model: wrapped or not; `None` for one that is taken at its word.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = list(model.modules()) if model is not None else []
        theirs = [each for each in modules if hasattr(getattr(each, "config", None), "_attn_implementation")]
        masking = [each for each in theirs if any(map(_masks_by_position, type(each).__mro__))]
        self._module: Any = next(itertools.chain(masking, theirs), None)
        self._by_position = bool(masking)
        two = (getattr(getattr(each, "config", None), "is_encoder_decoder", None) for each in modules)
        self._has_decoder = next((each for each in two if each is not None), False)  # the outermost that says so
        self._names = next(filter(None, map(_argument_names, modules)), ("input_ids",))
        self.has_virtual_tokens = bool(virtual_tokens(model))

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs of a forward pass by name. A dictionary as the first argument holds them by name too."""
        first = dict(args[0]) if args and isinstance(args[0], Mapping) else dict(zip(self._names, args, strict=False))
        return first | dict(kwargs)

    def has_decoder(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model has an encoder and a decoder, each with sequences of its own."""
        return self._has_decoder or any(inputs.get(name) is not None for name in _OF_A_DECODER)

    def why_not(self, name: str, inputs: Mapping[str, Any], batch: int) -> str:
        """Returns why the model would not keep documents apart by an input that is there; empty where it would."""
        if self.has_virtual_tokens:
            return "not kept to beside peft's virtual tokens, which all documents of a sequence attend to"
        if name == "attention_mask":
            return self._why_no_mask(inputs[name])
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) or (mask is not None and name != "seq_idx"):
            return "not read beside an attention_mask; leave that out"
        if name == "position_ids":
            return self._why_no_positions(inputs, batch)
        if name == "seq_idx":
            return "" if self._module is None or mask is not None else "read together with a BlockMask alone"
        return self._why_no_lengths(name, inputs, batch)

    @property
    def flash(self) -> bool:
        """Whether the model has flash attention, of any kind."""
        return "flash" in (self._implementation or "")

    @property
    def _implementation(self) -> str | None:
        return None if self._module is None else self._module.config._attn_implementation

    def _why_no_mask(self, mask: Tensor) -> str:
        if self._module is not None and mask.dim() == 4 and not self._by_position and _is_old():
            return f"transformers {importlib.metadata.version('transformers')} reads it otherwise in this model"
        if self._module is None or (self._implementation == "sdpa" and mask.dim() == 4):
            return ""
        if mask.dim() != 4 or self.flash:
            return f'the attention "{self._implementation}" takes no mask of the shape {list(mask.shape)}'
        if not mask.is_floating_point():
            return f'the attention "{self._implementation}" adds truth values to the scores: give 0 and minus infinity'
        return ""

    def _why_no_lengths(self, name: str, inputs: Mapping[str, Any], batch: int) -> str:
        if batch != 1:
            return f"they are of a batch of one row, not of {batch}"
        if self._module is None:
            return ""
        if not self.flash or name not in _LENGTHS:
            return f'not read by the attention "{self._implementation}"'
        missing = [each for each in _LENGTHS if inputs.get(each) is None]
        return f"not read without {', '.join(missing)}" if missing else ""

    def _why_no_positions(self, inputs: Mapping[str, Any], batch: int) -> str:
        if self._module is None:
            return ""
        config = self._module.config
        if not self._by_position or not getattr(config, "is_causal", True):
            return "this model makes its attention mask without them"
        if self.flash:
            return "" if batch == 1 else f"flash attention reads them in a batch of one row, not of {batch}"
        if self._implementation not in _MASKED_BY_POSITION:
            return f'the attention "{self._implementation}" gets no mask made from them'
        cache = inputs.get("use_cache")
        cache = getattr(config, "use_cache", False) if cache is None else cache
        checkpointed = getattr(self._module, "gradient_checkpointing", False) and self._module.training
        checkpointed = checkpointed and torch.is_grad_enabled()  # from transformers 5.24 on not without gradients
        given = any(inputs.get(name) is not None for name in ("past_key_values", "cache"))  # the latter from 5.24 on
        if given or (cache and not checkpointed):
            return "not read where there is a cache; set model.config.use_cache = False"
        return ""


@functools.cache
def _is_old() -> bool:
    return int(importlib.metadata.version("transformers").partition(".")[0]) < 5


@functools.cache
def _masks_by_position(kind: type) -> bool:
    """Whether the source of a class calls what makes a causal mask with `position_ids`."""
    if "forward" not in vars(kind) or kind.__module__.startswith("torch."):
        return False
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # made on the fly, as FSDP2 does: its bases have the source
        return False
    nodes = list(ast.walk(ast.parse(source)))
    gathered = any(isinstance(node, ast.Constant) and node.value == "position_ids" for node in nodes)
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if "mask" in name and "bidirectional" not in name:
            for keyword in call.keywords:
                if keyword.arg == "position_ids" and ast.unparse(keyword.value) != "None":
                    return True
                if keyword.arg is None and gathered:  # create_causal_mask(**{"position_ids": ...})
                    return True
    return False


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes by position; none for a wrapper that passes everything on."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(type(module).forward).parameters.values()
    return tuple(each.name for each in arguments if each.kind in positional)[1:]
