"""Windows that end otherwise than with their step: cleared, given up after an error, or never resolved at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from unit.tiny import assert_mean_of_rows, batches, gradient, mean_of_rows, register, square, tiny_model, window

from bucketmoo_ds.adapters.session import Session
from bucketmoo_ds.errors import BucketMOOError, LanguageError


def each_gradient(change: Callable[[nn.Parameter], object]) -> Callable[[nn.Module], None]:
    def clear(model: nn.Module) -> None:
        for parameter in model.parameters():
            change(parameter)

    return clear


CLEARINGS: dict[str, Callable[[nn.Module], object]] = {
    "model.zero_grad()": lambda model: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad()": lambda model: torch.optim.SGD(model.parameters()).zero_grad(),
    "optimizer.zero_grad(set_to_none=False)": lambda model: torch.optim.SGD(model.parameters()).zero_grad(False),
    "p.grad.zero_()": each_gradient(lambda parameter: parameter.grad.zero_()),
    "p.grad = None": each_gradient(lambda parameter: setattr(parameter, "grad", None)),
    "del p.grad": each_gradient(lambda parameter: delattr(parameter, "grad")),
    "p.grad = zeros": each_gradient(lambda parameter: setattr(parameter, "grad", torch.zeros_like(parameter))),
    "p.grad.data.mul_(0)": each_gradient(lambda parameter: parameter.grad.data.mul_(0)),
    "_foreach_zero_": lambda model: torch._foreach_zero_([parameter.grad for parameter in model.parameters()]),
}


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("clear", CLEARINGS.values(), ids=CLEARINGS)
def test_a_resolved_window_is_given_up_by_clearing(clear: Callable[[nn.Module], object], micro_steps: int) -> None:
    model = tiny_model()
    session = register(model, micro_steps)
    for seed in range(3):
        inputs = batches(micro_steps, seed)
        window(session, model, inputs)
        torch.testing.assert_close(gradient(model), mean_of_rows(tiny_model(), inputs))
        clear(model)
    assert session.moo.windows == 3


@pytest.mark.parametrize("left", [0, 3])
def test_clearing_some_is_not_clearing(left: int) -> None:
    """Not even where the one that is left is the first whose next gradient comes."""
    model = tiny_model()
    session = register(model, 1)
    window(session, model, batches(1))
    for number, parameter in enumerate(model.parameters()):
        if number != left:
            parameter.grad = None
    with pytest.raises(BucketMOOError, match=r"call optimizer\.step\(\) and optimizer\.zero_grad\(\)"):
        window(session, model, batches(1))


@pytest.mark.parametrize("clear", ["never", "zeros", "none"])
def test_a_model_of_one_parameter(clear: str) -> None:
    """Whose own gradient is all that can tell."""
    model = nn.Linear(4, 3, bias=False)
    twin = nn.Linear(4, 3, bias=False)
    twin.load_state_dict(model.state_dict())
    session = register(model, 1)
    window(session, model, batches(1, seed=1))
    if clear == "never":
        with pytest.raises(BucketMOOError, match="backward after the boundary of a window"):
            window(session, model, batches(1))
        return
    model.zero_grad(set_to_none=clear == "none")
    window(session, model, batches(1))
    torch.testing.assert_close(gradient(model), mean_of_rows(twin, batches(1)))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_a_grad_scaler_skips(bad: float) -> None:
    model, twin = tiny_model(), tiny_model()
    session = register(model, on_nonfinite="keep")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for number in range(3):
        inputs = batches(seed=number)
        before = weights_of(model)
        factor = bad if number == 1 else 1.0
        window(session, model, inputs, lambda model, each, factor=factor: scaler.scale(square(model, each) * factor))
        scaler.unscale_(optimizer)
        if number != 1:
            twin.load_state_dict(model.state_dict())
            assert_mean_of_rows(session, model, mean_of_rows(twin, inputs))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=number == 0)
        assert torch.equal(before, weights_of(model)) == (number == 1)
    assert session.moo.counters["skipped_windows"] == 1
    assert session.moo.windows == 3


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


# --- errors that are caught ---------------------------------------------------------------------------------------


class FaultError(Exception):
    """What went wrong, in whatever the user does."""


def fail(*_: object) -> None:
    raise FaultError


def in_backward(session: Session, model: nn.Module) -> None:
    """After some gradients have come."""
    handle = model[0].weight.register_hook(fail)
    try:
        with session.language("de"):
            loss = square(model, batches()[0])
        loss.backward()
    finally:
        handle.remove()


def before_any_gradient(session: Session, model: nn.Module) -> None:
    with session.language("de"):
        outputs = model(batches()[0])
    outputs.register_hook(fail)
    outputs.sum().backward()


def in_forward(session: Session, model: nn.Module) -> None:
    handle = model[2].register_forward_hook(fail)
    try:
        with session.language("de"):
            model(batches()[0])
    finally:
        handle.remove()


def in_the_loss(session: Session, model: nn.Module) -> None:
    with session.language("de"):
        model(batches()[0])
    fail()


def without_a_language(session: Session, model: nn.Module) -> None:
    square(model, batches()[0]).backward()


def of_an_unknown_language(session: Session, model: nn.Module) -> None:
    with session.language("xx"):
        loss = square(model, batches()[0])
    loss.backward()


FAULTS = [in_backward, before_any_gradient, in_forward, in_the_loss, without_a_language, of_an_unknown_language]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_caught_error_and_abandon(fault: Callable[[Session, nn.Module], None], before: int) -> None:
    """In the first micro-step and in the last: the next window is whole, and its own."""
    model = tiny_model()
    session = register(model)
    with session.language("fr"):
        losses = [square(model, each) for each in batches(before, seed=1)]
    for loss in losses:
        loss.backward()
    with pytest.raises((FaultError, LanguageError)):
        fault(session, model)
    session.abandon()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not session.moo.in_window
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    window(session, model, batches())
    assert_mean_of_rows(session, model, mean_of_rows(tiny_model(), batches()))
    assert session.last.target_tokens == (1, 1)


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("fault", [in_backward, without_a_language, of_an_unknown_language])
def test_a_caught_error_without_abandon(fault: Callable[[Session, nn.Module], None], before: int) -> None:
    """Some parameter holds half of something: neither a step nor another micro-step is taken, even if the window before
    was resolved and used."""
    model = tiny_model()
    session = register(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for language, each in zip(("de", "fr"), batches(before, seed=1), strict=False):
        with session.language(language):
            loss = square(model, each)
        loss.backward()
    if before == 2:
        optimizer.step()
        optimizer.zero_grad()
    weights = weights_of(model)
    with pytest.raises((FaultError, LanguageError)):
        fault(session, model)
    for _ in range(2):
        with pytest.raises(BucketMOOError, match=r"call abandon\(\) on every rank"):
            optimizer.step()
        with pytest.raises(BucketMOOError, match=r"call abandon\(\) on every rank"):
            window(session, model, batches())
        optimizer.zero_grad()
    assert torch.equal(weights, weights_of(model))


@pytest.mark.parametrize("fault", [before_any_gradient, in_forward])
@pytest.mark.parametrize("before", [0, 1])
def test_an_error_before_any_gradient_leaves_the_window_as_it_was(
    fault: Callable[[Session, nn.Module], None], before: int
) -> None:
    """A batch that is too long for the memory may be left out."""
    model = tiny_model()
    session = register(model)
    for number, language in enumerate(("de", "fr")):
        if number == before:
            with pytest.raises(FaultError):
                fault(session, model)
        with session.language(language):
            loss = square(model, batches()[number])
        (loss / 2).backward()
    assert_mean_of_rows(session, model, mean_of_rows(tiny_model(), batches()))
    assert session.last.target_tokens == (1, 1)


def test_abandon_gives_up_a_resolved_window() -> None:
    model = tiny_model()
    session = register(model)
    window(session, model, batches(seed=1))
    session.abandon()
    assert all(parameter.grad is None for parameter in model.parameters())
    window(session, model, batches())
    assert_mean_of_rows(session, model, mean_of_rows(tiny_model(), batches()))
    assert session.moo.windows == 2, "it was resolved all the same"


# --- steps --------------------------------------------------------------------------------------------------------


def test_a_step_without_gradients_is_nobodys_business() -> None:
    model = tiny_model()
    session = register(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with zeros, to make its state before a checkpoint is loaded into it
    window(session, model, batches())
    assert_mean_of_rows(session, model, mean_of_rows(model_like(model), batches()))
    optimizer.step()


def model_like(model: nn.Module) -> nn.Module:
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("some", [slice(None), slice(1), slice(3, None)])
def test_a_step_on_gradients_that_no_window_resolved(some: slice) -> None:
    """From before `register`, or set by hand; of all parameters or of some."""
    model = tiny_model()
    square(model, batches()[0]).backward()
    for parameter in list(model.parameters())[some]:
        parameter.grad = torch.ones_like(parameter)
    session = register(model)
    weights = weights_of(model)
    with pytest.raises(BucketMOOError, match="gradients that no window has resolved"):
        torch.optim.SGD(list(model.parameters())[some], lr=0.1).step()
    assert torch.equal(weights, weights_of(model))
    window(session, model, batches())
    assert_mean_of_rows(session, model, mean_of_rows(model_like(model), batches()))


@pytest.mark.parametrize("taken", [1, 2])
def test_a_step_within_a_window(taken: int) -> None:
    model = tiny_model()
    session = register(model, micro_steps=3)
    with session.language("de"):
        loss = square(model, batches()[0])
    loss.backward()
    if taken == 2:
        with session.language("fr"):
            loss = square(model, batches()[1])
        loss.backward()
    with pytest.raises(BucketMOOError, match=f"after {taken} of 3 micro-steps"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_optimizers_over_parts_of_the_model_use_one_window() -> None:
    model = tiny_model()
    session = register(model)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])]
    for number in range(2):
        window(session, model, batches(seed=number))
        weights = weights_of(model)
        for optimizer in optimizers:
            optimizer.step()
        assert (weights != weights_of(model)).all()
        model.zero_grad()
    assert session.moo.windows == 2


def test_optimizers_of_other_parameters_step_when_they_like() -> None:
    """Within a window, too, and with a parameter group of ours that is empty."""
    model, other = tiny_model(), nn.Linear(4, 2)
    session = register(model)
    optimizer = torch.optim.SGD([{"params": other.parameters()}, {"params": []}], lr=0.1)
    for language, each in zip(("de", "fr"), batches(), strict=True):
        with session.language(language):
            loss = square(model, each)
        (loss / 2).backward()
        square(other, each).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_mean_of_rows(session, model, mean_of_rows(tiny_model(), batches()))


def test_one_optimizer_of_this_and_another_model() -> None:
    """It steps on this one's window, or not at all."""
    model, other = tiny_model(), nn.Linear(4, 2)
    session = register(model)
    optimizer = torch.optim.SGD([*other.parameters(), *model.parameters()], lr=0.1)
    square(other, batches()[0]).backward()
    optimizer.step()  # this one has no gradients
    with session.language("de"):
        loss = square(model, batches()[0])
    loss.backward()
    with pytest.raises(BucketMOOError, match="after 1 of 2"):
        optimizer.step()
