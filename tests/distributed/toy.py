"""A small model with everything that makes sharding awkward, and language data for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

VOCABULARY = 23
SEQUENCES, LENGTH = 3, 12


class ToyLM(nn.Module):
    """Odd sizes everywhere, so that parameters straddle partitions and shards need padding.

    Args:
        tied: the head is the embedding.
        frozen: the middle layer takes no gradient.
        adapters: layers of equal size, of which a forward pass uses the one it is told, or none.
        small: a last layer with parameters of 1 and 5 elements, which leave some ranks a short chunk, or none.
    """

    def __init__(
        self, *, tied: bool = False, frozen: bool = False, adapters: int = 0, small: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 13)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 31), nn.GELU(), nn.Linear(31, 13), nn.LayerNorm(13)) for _ in range(3)
        )
        self.head = nn.Linear(13, VOCABULARY, bias=False)
        self.adapters = nn.ModuleList(nn.Linear(13, 13) for _ in range(adapters))
        if small:
            self.layers.append(nn.Sequential(nn.Linear(13, 1), nn.Tanh(), nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 13)))
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            for parameter in self.layers[1].parameters():
                parameter.requires_grad = False

    def forward(
        self, input_ids: Tensor | Mapping[str, Tensor], labels: Tensor | None = None, adapter: int | None = None
    ) -> Tensor:
        """Returns the mean loss per target token; a batch may come as one dictionary."""
        if isinstance(input_ids, Mapping):
            return self(**input_ids)
        return loss_of(self.logits(input_ids, adapter), labels)

    def logits(self, input_ids: Tensor, adapter: int | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        if adapter is not None:
            hidden = hidden + self.adapters[adapter](hidden)
        return self.head(hidden)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def micro_batch(
    language: int, generator: torch.Generator, *, ragged: bool = False, empty: bool = False
) -> dict[str, Tensor]:
    """A batch of one language, which has its own transition of tokens.

    Args:
        ragged: masks a random part of the targets.
        empty: masks all of them.
    """
    step = 2 * language + 1
    start = torch.randint(VOCABULARY, (SEQUENCES, 1), generator=generator)
    noise = torch.randint(3, (SEQUENCES, LENGTH), generator=generator)
    ids = (start + step * torch.arange(LENGTH) + noise) % VOCABULARY
    labels = ids.clone()
    if ragged:
        for row in range(SEQUENCES):
            labels[row, int(torch.randint(4, LENGTH, (), generator=generator)) :] = -100
    if empty:
        labels[:] = -100
    return {"input_ids": ids, "labels": labels}


def tokens_of(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())
