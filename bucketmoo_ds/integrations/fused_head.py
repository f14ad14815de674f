"""TRL's fused LM head reads the head's weight outside of the head, and makes its gradient inside the loss, of all
languages together. Where languages are told apart, a training pass goes through the head itself, and returns the same
fields from its logits, which take the memory that the fusion saves. Evaluation stays fused.

Read in TRL 1.16 (`trainer/utils.py`, `add_fused_lm_head`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FUSED = "_fused_forward"


def unfuse(model: nn.Module) -> None:
    """Lets the training passes of a model that TRL has given a fused head go through the head itself."""
    for module in model.modules():
        fused: Any = vars(module).get("forward")
        code = getattr(getattr(fused, "__func__", None), "__code__", None)
        if code is not None and code.co_name == _FUSED:
            module.forward = _through_head(fused)


def _through_head(fused: Any) -> Any:
    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or not torch.is_grad_enabled():
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        shifted = kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        outputs = fused(*args, **{**kwargs, "use_cache": False})
        if shifted is None:
            logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        else:
            logits, targets = outputs.logits, shifted
        fields = per_token(logits, targets)
        mask = targets != -100
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
        auxiliary = getattr(outputs, "aux_loss", None)
        if auxiliary is not None:
            loss = loss + getattr(fused.__self__.config.get_text_config(), "router_aux_loss_coef", 0.0) * auxiliary
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=auxiliary, **fields)

    return forward


def per_token(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Returns what the fused head does of every target, 0 where it is -100.

    Args:
        logits: `[batch, sequence, vocabulary]`.
        targets: `[batch, sequence]` int64.
    """
    mask, wanted = targets != -100, targets.clamp(min=0).unsqueeze(-1)
    log_probs = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = log_probs.argmax(-1) == wanted.squeeze(-1)
    return {
        "log_probs": log_probs.gather(-1, wanted).squeeze(-1).masked_fill(~mask, 0.0),
        "entropy": entropy.masked_fill(~mask, 0.0),
        "is_top1": is_top1 & mask,
    }
