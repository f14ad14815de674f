"""Parameters that are frozen and unfrozen between windows, as LISA and half fine-tuning do it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from draw import SEED
from torch import Tensor, nn
from torch.nn import functional
from unit.mixed import stack
from unit.mixed.stack import LANGUAGES, WIDTH, WORDS

from bucketmoo_ds.errors import BucketMOOError, ConfigError

SEQUENCES, LENGTH = 2 * len(LANGUAGES), 5


class Model(nn.Module):
    """Two layers and a head; `outside` uses the second layer's weight without the layer."""

    def __init__(self, outside: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.outside = nn.LayerNorm(WIDTH), outside

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = torch.tanh(self.first(self.embedding(input_ids)))
        rows = rows + (functional.linear(rows, self.second.weight) if self.outside else self.second(rows))
        return self.norm(rows).square().mul(torch.arange(WIDTH)).mean()


def made(**arguments: Any) -> Model:
    torch.manual_seed(SEED)
    return Model(**arguments).double()


def window(session: Any, model: nn.Module, number: int) -> None:
    ids = torch.randint(WORDS, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(SEED + number))
    model.zero_grad()
    model(input_ids=ids, language=torch.arange(SEQUENCES) % len(LANGUAGES)).backward()
    session.end_window()


def test_a_frozen_block_keeps_its_gram_and_one_that_comes_back_gets_a_new_one() -> None:
    model = made()
    session = stack.register(model, gram_every=8)
    first, second = (stack.block_of(session)[f"{name}.weight"] for name in ("first", "second"))
    found = []
    for number, frozen in enumerate(("second", "second", "first", "first", "")):
        for name in ("first", "second"):
            model.get_submodule(name).requires_grad_(name != frozen)
        before = session.estimate.taken
        window(session, model, number)
        found.append((session.estimate.taken > before, stack.grams(session).clone()))
        assert (model.first.weight.grad is None) == (frozen == "first")
        assert (model.second.weight.grad is None) == (frozen == "second")
    assert [took for took, _ in found] == [True, False, True, False, True]  # and not only every eighth window
    assert not found[0][1][second].any()
    assert torch.equal(found[2][1][first], found[0][1][first])
    assert found[2][1][second].any()
    assert not torch.equal(found[4][1][first], found[2][1][first])


def test_part_of_a_block_is_frozen() -> None:
    """The Gram and the gradient are those of what is trained."""
    model = made()
    session = stack.register(model, granularity="model")
    model.first.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.embedding.requires_grad_(False)
    plain = copy.deepcopy(model)
    frozen = [each for each in session.plan.parameters if not plain.get_parameter(each.name).requires_grad]
    window(session, model, 0)
    rest = stack.register(plain, granularity="model")
    window(rest, plain, 0)
    assert len(rest.plan.parameters) == len(session.plan.parameters) - len(frozen)
    assert torch.allclose(stack.grams(session), stack.grams(rest), rtol=1e-12, atol=0)  # a few sums, each of 2^-53
    for name, each in model.named_parameters():
        other = plain.get_parameter(name).grad
        assert (each.grad is None) == (other is None) == (not each.requires_grad)
        assert other is None or torch.equal(each.grad, other)


def test_a_resumed_run_knows_what_was_frozen() -> None:
    model = made()
    session = stack.register(model, gram_every=8)
    model.first.requires_grad_(False)
    window(session, model, 0)
    state = session.state_dict()
    resumed = stack.register(copy.deepcopy(model).requires_grad_(True), gram_every=8)
    resumed.load_state_dict(state)
    resumed._model.get_submodule("first").requires_grad_(False)
    for run in (session, resumed):
        window(run, run._model, 1)
    assert resumed.state_dict() == session.state_dict()


def test_what_was_followed_in_the_first_pass_is_followed_again() -> None:
    """A use outside of the module is not in the graph while its parameter is frozen."""
    model = made(outside=True)
    session = stack.register(model)
    model.second.requires_grad_(False)
    window(session, model, 0)
    model.second.requires_grad_(True)
    with pytest.raises(BucketMOOError, match=r'parameter "second\.weight" is used outside'):
        window(session, model, 1)


def test_gradient_hooks() -> None:
    model = made()
    handle = model.first.weight.register_hook(lambda gradient: gradient * 0.5)
    with pytest.raises(ConfigError, match=r'"first\.weight" has a gradient hook .*freeze what it masks'):
        stack.register(model)
    handle.remove()
    session = stack.register(model)
    window(session, model, 0)
    model.second.weight.register_hook(lambda gradient: gradient * 0.5)
    with pytest.raises(BucketMOOError, match=r'"second\.weight" has a gradient hook'):
        window(session, model, 1)
