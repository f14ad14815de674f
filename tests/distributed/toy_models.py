"""The toy model in the shapes that models have elsewhere: other outputs, and parameters of other kinds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import toy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


@dataclasses.dataclass
class Outputs:
    """What torch's pytree does not look into."""

    loss: Tensor
    logits: Tensor


class WithLogits(toy.ToyLM):
    """Returns the loss together with the logits that it was made from, as transformers' models do.

    Args:
        kind: `dict` or `dataclass`.
    """

    def __init__(self, kind: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kind = {"dict": dict, "dataclass": Outputs}[kind]

    def forward(self, input_ids: Tensor, labels: Tensor, adapter: int | None = None) -> Any:
        logits = self.logits(input_ids, adapter)
        return self.kind(loss=toy.loss_of(logits, labels), logits=logits)


class LoRA(toy.ToyLM):
    """Everything is frozen but a product of two small matrices beside every linear layer."""

    def __init__(self, rank: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.requires_grad_(False)
        for layer in self.layers:
            for index in (0, 2):
                layer[index] = _LowRank(layer[index], rank)


class _LowRank(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


class Flat(toy.ToyLM):
    """Parameters of one dimension and of one element, which some ranks hold nothing of."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(toy.VOCABULARY))

    def logits(self, input_ids: Tensor, adapter: int | None = None) -> Tensor:
        return super().logits(input_ids, adapter) * self.gain + self.shift


class Sparse(toy.ToyLM):
    """An embedding whose gradient names its rows."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.embed = nn.Embedding(toy.VOCABULARY, 13, sparse=True)


class ForMuon(toy.ToyLM):
    """Matrices marked as DeepSpeed marks them for its Muon optimizer."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for layer in self.layers:
            layer[0].weight.use_muon = True


def with_checkpoints(model: toy.ToyLM, how: str) -> toy.ToyLM:
    """Activation checkpointing of every layer.

    Args:
        how: `none`, `reentrant` or `no_reentrant`.
    """
    if how != "none":
        for index, layer in enumerate(model.layers):
            model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=getattr(CheckpointImpl, how.upper()))
    return model
