"""What mixed languages cannot be told apart in is refused: by name, with the reason and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from transformers import T5Config, T5ForConditionalGeneration

import bucketmoo_ds as bm
from bucketmoo_ds.errors import BucketMOOError, ConfigError

WIDTH = 6
CONFIG = bm.BucketMOOConfig(languages=("de", "fr"), aggregator="mean", shift_labels=False)
WAY_OUT = "Freeze its parameters; declare its class with bucketmoo_ds.mixed.row_wise if it is so; or feed one language"


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))


class Quantized(nn.Linear):
    """As libraries of quantized layers write them."""

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight.round(), self.bias)


def replaced() -> nn.Module:
    module = nn.Linear(WIDTH, WIDTH)
    module.forward = module.forward  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Conv1d(WIDTH, WIDTH, 3), '"inner" (Conv1d)'),
        (lambda: nn.BatchNorm1d(WIDTH), '"inner" (BatchNorm1d)'),
        (lambda: nn.LSTM(WIDTH, WIDTH), '"inner" (LSTM)'),
        (lambda: nn.MultiheadAttention(WIDTH, 2), '"inner" (MultiheadAttention)'),
        (
            lambda: nn.MultiheadAttention(WIDTH, 2),
            '"inner.out_proj" (NonDynamicallyQuantizableLinear, whose weight nn.MultiheadAttention uses without its',
        ),
        (lambda: nn.Embedding(9, WIDTH, max_norm=1.0), '"inner" (Embedding, with max_norm)'),
        (lambda: nn.Embedding(9, WIDTH, sparse=True), '"inner" (Embedding, with sparse)'),
        (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), '"inner.parametrizations.weight" (Param'),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)), '"inner" (Linear)'),
        (Own, '"inner" (Own)'),
        (lambda: Quantized(WIDTH, WIDTH), '"inner" (Quantized)'),
        (replaced, '"inner" (Linear, whose forward somebody has replaced)'),
    ],
)
def test_at_register(make: Callable[[], nn.Module], named: str) -> None:
    model = nn.ModuleDict({"inner": make(), "other": nn.Linear(WIDTH, WIDTH)})
    with pytest.raises(ConfigError, match=f"{re.escape(named)}.*{re.escape(WAY_OUT)}"):
        bm.mixed.register(model, CONFIG)
    model["inner"].requires_grad_(False)  # the way out
    bm.mixed.register(model, CONFIG)


def test_relative_positions_at_register() -> None:
    """Their rows are pairs of tokens, which may look like a batch of tokens."""
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=6, d_kv=3, d_ff=8, num_layers=1, num_heads=2))
    names = (
        r'"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias" \(Embedding, whose rows are pairs of'
    )
    with pytest.raises(ConfigError, match=names):
        bm.mixed.register(model, CONFIG)


class FusedLoss(torch.autograd.Function):
    """A head and its loss that make the weight's gradient inside, as Liger's."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return (rows @ weight.mT).mean()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ones_like(rows) * weight.sum(0), torch.ones_like(weight) * rows.sum((0, 1))


class Words(nn.Module):
    """A model whose use of its embedding is the test's."""

    def __init__(self, use: Callable[[Words, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.use = use

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.use(self, self.linear(self.embedding(input_ids)))


IDS = torch.arange(8).view(2, 4)
OUTSIDE = 'parameter "embedding.weight" is used outside of its own module\'s forward'


@pytest.mark.parametrize(
    "use",
    [
        lambda model, rows: functional.linear(rows, model.embedding.weight).mean(),
        lambda model, rows: (rows @ model.embedding.weight.mT).mean(),
        lambda model, rows: FusedLoss.apply(rows, model.embedding.weight),
        lambda model, rows: rows.mean() + model.embedding.weight.square().sum(),
        torch.compile(lambda model, rows: (rows @ model.embedding.weight.mT).mean(), backend="eager"),
    ],
)
def test_a_parameter_without_its_module(use: Callable[[Words, Tensor], Tensor]) -> None:
    model = Words(use)
    bm.mixed.register(model, CONFIG)
    with torch.no_grad():
        model(IDS)
    with pytest.raises(BucketMOOError, match=OUTSIDE):
        model(IDS, language=["de", "fr"])


@pytest.mark.parametrize("detached", [True, False])
def test_rows_of_something_else(detached: bool) -> None:
    """They are an error if a gradient comes to them, and not before."""

    def use(model: Words, rows: Tensor) -> Tensor:
        other = model.linear(torch.eye(WIDTH)).sum()
        return rows.mean() + (other.detach() if detached else other)

    model = Words(use)
    session = bm.mixed.register(model, CONFIG)
    loss = model(IDS, language=["de", "fr"])
    if detached:
        loss.backward()
        session.end_window()
    else:
        with pytest.raises(
            BucketMOOError, match=r'module "linear" gets rows \[6, 6\], which are not the tokens of the'
        ):
            loss.backward()


def test_what_is_unfrozen_later() -> None:
    model = Words(lambda model, rows: rows.mean())
    model.linear.bias.requires_grad_(False)
    session = bm.mixed.register(model, CONFIG)
    model(IDS, language=["de", "fr"]).backward()
    session.end_window()
    model.linear.bias.requires_grad_(True)
    with pytest.raises(BucketMOOError, match=r'parameter "linear\.bias" is trained, and was not when the model was'):
        model(IDS, language=["de", "fr"])
    session.close()
    bm.mixed.register(model, CONFIG)
    model(IDS, language=["de", "fr"]).backward()
    assert model.linear.bias.grad is not None


def test_a_matrix_that_two_kinds_share() -> None:
    @bm.mixed.row_wise
    class Head(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.table = weight

        def forward(self, rows: Tensor) -> Tensor:
            return rows @ self.table.mT

    model = Words(lambda model, rows: rows.mean())
    model.head = Head(model.embedding.weight)
    with pytest.raises(ConfigError, match=r'"head" \(Head, which shares a matrix with a module of a kind\)'):
        bm.mixed.register(model, CONFIG)
