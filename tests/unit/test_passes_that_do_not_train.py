"""A micro-step is a backward that brings the model's parameters gradients. Whatever else is derived through the model
is none, and takes no part in the one that follows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from unit.tiny import (
    LANGUAGES,
    Loss,
    assert_mean_of_rows,
    batches,
    gradient,
    mean_of_rows,
    register,
    square,
    tiny_model,
    window,
)

from bucketmoo_ds.errors import LanguageError


def penalised(model: nn.Module, inputs: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_(True)
    outputs = model(inputs)
    (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return outputs.square().mean() + (slope.norm(dim=1) - 1).square().mean()


def penalty_alone(model: nn.Module, inputs: Tensor) -> Tensor:
    """The backward goes through no output of the model."""
    inputs = inputs.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return slope.square().sum()


def adversarial(model: nn.Module, inputs: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(square(model, inputs), inputs)
    return square(model, (inputs + 0.1 * slope.sign()).detach())


def adversarial_by_backward(model: nn.Module, inputs: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_(True)
    square(model, inputs).backward(inputs=[inputs])
    return square(model, (inputs + 0.1 * inputs.grad).detach())


def logged_by_input(model: nn.Module, inputs: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_(True)
    loss = square(model, inputs)
    torch.autograd.grad(loss, inputs, retain_graph=True)
    return loss


def logged_by_parameter(model: nn.Module, inputs: Tensor) -> Tensor:
    loss = square(model, inputs)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return loss


def logged_twice_elsewhere(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of a pass of its own, whose graph is gone by the time of the next."""
    for _ in range(2):
        torch.autograd.grad(square(model, inputs + 1), list(model.parameters()))
    return square(model, inputs)


def curvature(model: nn.Module, inputs: Tensor) -> Tensor:
    """A product of the Hessian and a vector, by differentiating twice."""
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(square(model, inputs), parameters, create_graph=True)
    torch.autograd.grad(sum(slope.square().sum() for slope in slopes), parameters)
    return square(model, inputs)


def two_passes(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) - model(inputs.flip(0))).square().mean() + square(model, inputs)


def through_the_model_to_another(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model judges what a generator makes, whose gradient alone is asked for."""
    generator = nn.Linear(*inputs.shape[-1:] * 2)
    square(model, generator(inputs)).backward(inputs=list(generator.parameters()))
    assert generator.weight.grad.any()
    return square(model, inputs)


def through_the_frozen_model(model: nn.Module, inputs: Tensor) -> Tensor:
    generator = nn.Linear(*inputs.shape[-1:] * 2)
    model.requires_grad_(False)
    square(model, generator(inputs)).backward()
    model.requires_grad_(True)
    return square(model, inputs)


def adapted(model: nn.Module, inputs: Tensor) -> Tensor:
    """A step on parameters that are computed from the model's, and the loss after it."""
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(square(model, inputs), list(parameters.values()), create_graph=True)
    after = {name: each - 0.1 * slope for (name, each), slope in zip(parameters.items(), slopes, strict=True)}
    return torch.func.functional_call(model, after, (inputs,)).square().mean()


PASSES = [
    penalised,
    penalty_alone,
    adversarial,
    adversarial_by_backward,
    logged_by_input,
    logged_by_parameter,
    logged_twice_elsewhere,
    curvature,
    two_passes,
    through_the_model_to_another,
    through_the_frozen_model,
    adapted,
]


@pytest.mark.parametrize("micro_steps", [2, 4])
@pytest.mark.parametrize("loss_of", PASSES)
def test_gradient_is_the_mean_of_the_rows(loss_of: Loss, micro_steps: int) -> None:
    """In two windows, so that what a pass leaves behind would be found."""
    model, twin = tiny_model(), tiny_model()
    session = register(model, micro_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(2):
        inputs = batches(micro_steps, seed=number)
        twin.load_state_dict(model.state_dict())
        expected = mean_of_rows(twin, inputs, loss_of)
        window(session, model, inputs, loss_of)
        assert_mean_of_rows(session, model, expected)
        assert session.moo.windows == number + 1
        optimizer.step()
        optimizer.zero_grad()


def by_input(model: nn.Module, inputs: Tensor) -> None:
    inputs = inputs.clone().requires_grad_(True)
    torch.autograd.grad(square(model, inputs), inputs)


def by_parameter(model: nn.Module, inputs: Tensor) -> None:
    torch.autograd.grad(square(model, inputs), list(model.parameters()))


def of_another_leaf(model: nn.Module, inputs: Tensor) -> None:
    offset = torch.zeros(1, requires_grad=True)
    penalised(model, inputs + offset).backward(inputs=[offset])


@pytest.mark.parametrize("look", [by_input, by_parameter, of_another_leaf])
@pytest.mark.parametrize("named", [False, True])
def test_it_need_not_be_of_the_language_that_trains_next(
    look: Callable[[nn.Module, Tensor], None], named: bool
) -> None:
    """Nor name one. Between the micro-steps of a window, and between its end and its step."""
    model, inputs, others = tiny_model(), batches(2), batches(3, seed=1)
    session = register(model)

    def aside(number: int) -> None:
        with session.language(LANGUAGES[1 - number % 2]) if named else contextlib.nullcontext():
            look(model, others[number])

    for number, language in enumerate(LANGUAGES):
        aside(number)
        with session.language(language):
            loss = square(model, inputs[number])
        (loss / 2).backward()
    before = gradient(model)
    aside(2)
    assert torch.equal(before, gradient(model))
    assert_mean_of_rows(session, model, mean_of_rows(tiny_model(), inputs))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert session.moo.windows == 1


def test_double_differentiable_backward() -> None:
    """`create_graph` makes gradients that have a graph; rows keep none."""
    model, twin = tiny_model(), tiny_model()
    session = register(model)
    window(session, model, batches(), create_graph=True)
    assert not any(parameter.grad.requires_grad for parameter in model.parameters())
    assert_mean_of_rows(session, model, mean_of_rows(twin, batches()))


def test_a_second_backward_over_one_forward_pass() -> None:
    """Which would be a micro-step of a pass that had its own: refused, and what to do is said."""
    model = tiny_model()
    session = register(model)
    with session.language("de"):
        loss = square(model, batches()[0])
    loss.backward(retain_graph=True)
    with pytest.raises(LanguageError, match="add losses over one forward pass up for it"):
        loss.backward()
    session.abandon()
    window(session, model, batches())
    assert session.moo.windows == 1


@pytest.mark.parametrize("inner", [lambda model: model[0], lambda model: nn.Sequential(*model)])
def test_a_call_of_a_module_inside(inner: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model()
    session = register(model)
    with session.language("de"), pytest.raises(LanguageError, match="not a module inside of it"):
        square(inner(model), batches()[0]).backward()
