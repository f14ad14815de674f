"""A small model with everything that makes sharding awkward, and language data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 23


class ToyLM(nn.Module):
    """Odd sizes everywhere, so that parameters straddle partitions and shards need padding."""

    def __init__(self, *, tied: bool = False, frozen: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 13)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 31), nn.GELU(), nn.Linear(31, 13), nn.LayerNorm(13)) for _ in range(3)
        )
        self.head = nn.Linear(13, VOCABULARY, bias=False)
        self.extra = nn.Linear(13, 13) if unused else None
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            for parameter in self.layers[1].parameters():
                parameter.requires_grad = False

    def forward(self, input_ids: Tensor, labels: Tensor, use_extra: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        if use_extra and self.extra is not None:
            hidden = hidden + self.extra(hidden)
        logits = self.head(hidden)
        return nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )


def micro_batch(language: int, generator: torch.Generator, *, ragged: bool) -> dict[str, Tensor]:
    """A batch of one language, which has its own transition of tokens; `ragged` masks a random part of the targets."""
    step = 2 * language + 1
    start = torch.randint(VOCABULARY, (3, 1), generator=generator)
    noise = torch.randint(3, (3, 12), generator=generator)
    ids = (start + step * torch.arange(12) + noise) % VOCABULARY
    labels = ids.clone()
    if ragged:
        for row in range(3):
            labels[row, int(torch.randint(4, 12, (), generator=generator)) :] = -100
    return {"input_ids": ids, "labels": labels}


def tokens_of(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())
