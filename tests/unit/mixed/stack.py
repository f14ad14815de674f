"""Random small models of the covered kinds, and what a mixed micro-batch has to give them: rows language by language.

The rows are of the plain model, once for each language: the same forward pass, whose loss is taken over the targets of
that language alone, so that a row has no rounding but that of its own sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import bucketmoo_ds as bm
from bucketmoo_ds.adapters.mixed import MixedSession

LANGUAGES = ("de", "fr", "sw")
WORDS, WIDTH, LENGTH = 13, 6, 8
IGNORED = -100

Rows = dict[str, Tensor]


class ShiftedNorm(nn.Module):
    """Gemma's norm in whichever precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class ResidualNorm(nn.Module):
    """Adds before it multiplies, as fused norms do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = rows if residual is None else rows + residual
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Keywords(nn.Module):
    """Modules that are called by keyword, and with more than their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.norm, self.residual = nn.LayerNorm(WIDTH), ResidualNorm(WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return self.residual(self.other(x=self.linear(input=self.norm(input=rows))), residual=rows)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.base(rows) + 0.5 * self.lora_B(self.lora_A(rows))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(rows)))


class Attention(nn.Module):
    """One head, causal, within documents; with a norm of queries as Gemma's, behind the transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH // 2)

    def forward(self, rows: Tensor, documents: Tensor) -> Tensor:
        parts = self.read(rows).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()
        mask = (mask & (documents.unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)
        mixed = functional.scaled_dot_product_attention(self.norm(parts[0]), parts[1], parts[2], attn_mask=mask)
        return self.write(mixed.transpose(1, 2).flatten(-2))


@bm.mixed.row_wise
class Gated(nn.Module):
    """Parameters of its own, with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.way = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        dropped = functional.dropout(rows @ self.way, 0.3, self.training)
        return self.inner(torch.sigmoid(self.gate) * dropped)


KINDS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    "conv1d": lambda: Conv1D(WIDTH, WIDTH),
    "twice": Twice,
    "lora": Lora,
    "attention": Attention,
    "keywords": Keywords,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "shifted norm": lambda: ShiftedNorm(WIDTH),
    "row-wise": Gated,
    "dropout": lambda: nn.Dropout(0.3),
}
IN_FLOAT32: Mapping[str, Callable[[], nn.Module]] = {  # they round to float32 whatever comes
    "llama's norm": lambda: LlamaRMSNorm(WIDTH),
    "gemma's norm": lambda: Gemma2RMSNorm(WIDTH),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model.

    Args:
        kinds: of its layers.
        tied: the head is the embedding.
        positions: "none", "shared" by the batch, or "each" sequence's.
        pooled: one target a sequence, in place of one a token.
        padded: the embedding has a `padding_idx`.
        reentrant: of activation checkpointing; `None`: without.
    """

    kinds: tuple[str, ...]
    tied: bool = False
    positions: str = "none"
    pooled: bool = False
    padded: bool = False
    reentrant: bool | None = None


class Stack(nn.Module):
    """A language model; documents begin where `position_ids` are 0."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=3 if shape.padded else None)
        self.positions = nn.Embedding(LENGTH, WIDTH) if shape.positions != "none" else None
        self.layers = nn.ModuleList((KINDS | IN_FLOAT32)[kind]() for kind in shape.kinds)
        self.head = nn.Linear(WIDTH, WORDS, bias=not shape.tied)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the targets that are not ignored."""
        rows, documents = self.embedding(input_ids), (position_ids == 0).cumsum(1)
        if self.positions is not None:
            shared = torch.arange(input_ids.shape[1])
            rows = rows + self.positions(shared if self.shape.positions == "shared" else position_ids)
        for layer in self.layers:
            if self.shape.reentrant is None:
                rows = self._layer(layer, rows, documents)
            else:
                rows = checkpoint(self._layer, layer, rows, documents, use_reentrant=self.shape.reentrant)
        logits = self.head(rows.mean(1) if self.shape.pooled else rows)
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def _layer(self, layer: nn.Module, rows: Tensor, documents: Tensor) -> Tensor:
        if isinstance(layer, nn.Dropout):
            return layer(rows)
        made = layer(rows, documents) if isinstance(layer, Attention) else layer(rows)
        return made if "Norm" in type(layer).__name__ else rows + torch.tanh(made)


def made(shape: Shape, dtype: torch.dtype, seed: int) -> Stack:
    """A model with the weights of a seed."""
    torch.manual_seed(seed)
    return Stack(shape).to(dtype)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A mixed micro-batch.

    Args:
        inputs: of the model.
        language: the entry, `[batch]` or `[batch, sequence]`.
        of_target: the language of each target, in the form of `targets`; -1 for none.
        half: the half of its language that the target's document is in.
    """

    inputs: dict[str, Tensor]
    language: Tensor
    of_target: Tensor
    half: Tensor

    def counts(self) -> Tensor:
        """`[K]`, target tokens."""
        there = self.inputs["labels"] != IGNORED
        return torch.stack([((self.of_target == each) & there).sum() for each in range(len(LANGUAGES))])

    def only(self, language: int, half: int | None = None) -> dict[str, Tensor]:
        """The inputs, with the targets of a language, or of a half of it."""
        there = self.of_target == language
        there = there & (self.half == half) if half is not None else there
        return {**self.inputs, "labels": torch.where(there, self.inputs["labels"], IGNORED)}


def draw_batch(generator: torch.Generator, packed: bool, pooled: bool, sequences: int = 0) -> Batch:
    """A batch in which every language has two documents at least, each with a target."""
    draw = lambda high, shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    count = len(LANGUAGES)
    sequences = sequences or 2 * count + int(draw(3, ()))
    length = LENGTH - 1 + int(draw(2, ()))
    positions = torch.arange(length).expand(sequences, -1).clone()
    if packed:
        cuts = 2 + draw(length - 3, (sequences,))
        positions = torch.where(positions >= cuts.unsqueeze(1), positions - cuts.unsqueeze(1), positions)
    documents = (positions == 0).flatten().cumsum(0).view(positions.shape) - 1
    number = int(documents.max()) + 1
    order = torch.randperm(number, generator=generator)
    of_document = torch.empty(number, dtype=torch.int64)
    of_document[order[: 2 * count]] = torch.arange(2 * count) % count
    of_document[order[2 * count :]] = draw(count + packed, (number - 2 * count,)) - int(packed)  # -1: of none
    ordinal = torch.stack([(of_document[:each] == of_document[each]).sum() for each in range(number)])
    languages, half = of_document[documents], (ordinal % 2)[documents]
    if pooled:
        targets = draw(WORDS, (sequences,))
        of_target, half = languages[:, 0], half[:, 0]
    else:
        targets, of_target = draw(WORDS, positions.shape), languages
        unlabelled = ((draw(3, positions.shape) == 0) & (positions > 0)) | (languages < 0)
        targets = torch.where(unlabelled, IGNORED, targets)
    inputs = {"input_ids": draw(WORDS, positions.shape), "position_ids": positions, "labels": targets}
    return Batch(inputs, languages if packed else languages[:, 0], of_target, half)


def rows_of(model: nn.Module, inputs: Mapping[str, Tensor], seed: int = 0) -> Rows:
    """The gradient of a plain model, float64 in the end."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).backward()
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return {name: torch.zeros_like(each) if each.grad is None else each.grad.clone() for name, each in named}


def register(model: nn.Module, **settings: Any) -> MixedSession:
    given = {"granularity": "parameter", "gram_every": 1, "smoothing": 0.0, "shift_labels": False} | settings
    return bm.mixed.register(model, bm.BucketMOOConfig(languages=LANGUAGES, **given))


def hand(session: MixedSession, weights: Tensor) -> None:
    """The weights `[B, K]` of the windows that come."""
    session.estimate.weights = lambda *_: weights.clone()  # type: ignore[method-assign]


def block_of(session: MixedSession) -> dict[str, int]:
    """The blocks of parameters by name."""
    pairs = zip(session.plan.parameters, session.plan.block_of, strict=True)
    return {parameter.name: int(block) for parameter, block in pairs}


def grams(session: MixedSession) -> Tensor:
    """What the estimate has taken, `[B, K, K]`."""
    kept = session.estimate._kept
    return kept[:-1] / kept[-1]


def expected_grams(session: MixedSession, model: nn.Module, batch: Batch, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of a plain model: the products of rows, and of the halves' rows on the diagonal, `[B, K, K]`; and the largest
    square of a row, `[B, 1, 1]`, which bounds what they are rounded to."""
    count, blocks = len(LANGUAGES), block_of(session)
    whole = [rows_of(model, batch.only(each), seed) for each in range(count)]
    halves = [[rows_of(model, batch.only(each, half), seed) for half in (0, 1)] for each in range(count)]
    total = torch.zeros(len(session.plan.blocks), count, count, dtype=torch.float64)
    squares = torch.zeros(len(session.plan.blocks), 3 * count, dtype=torch.float64)
    for name, block in blocks.items():
        rows = torch.stack([each[name].flatten().double() for each in whole])
        first, second = (torch.stack([each[half][name].flatten().double() for each in halves]) for half in (0, 1))
        total[block] += torch.where(torch.eye(count, dtype=torch.bool), first @ second.mT, rows @ rows.mT)
        squares[block] += torch.cat([rows, first, second]).square().sum(1)
    return total, squares.amax(1).view(-1, 1, 1)
