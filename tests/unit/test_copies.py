"""Copies of a registered model: plain models that compute and train, and are no part of the session."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from unit.tiny import assert_mean_of_rows, batches, gradient, mean_of_rows, register, square, tiny_model, window


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": AveragedModel,
    "torch.save": through_torch_save,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "in a container": lambda model: copy.deepcopy(nn.ModuleDict({"policy": model}))["policy"],
    "a copy's copy": lambda model: through_torch_save(copy.deepcopy(model)),
}


@pytest.mark.parametrize("when", ["before", "within", "resolved", "after"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_the_copy_is_plain_and_the_original_trains_on(make: Callable[[nn.Module], nn.Module], when: str) -> None:
    model, twin = tiny_model(), tiny_model()
    session = register(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = batches()
    taken = {"before": [], "within": inputs[:1]}.get(when, inputs)
    for language, each in zip(("de", "fr"), taken, strict=False):
        with session.language(language):
            loss = square(model, each)
        (loss / 2).backward()
    if when == "after":
        optimizer.step()
        optimizer.zero_grad()
    twin.load_state_dict(model.state_dict())
    copied = make(model)

    assert torch.equal(copied(inputs[0]), twin(inputs[0]))
    copied.zero_grad()
    for _ in range(3):  # no window of 2 and no language
        square(copied, inputs[0]).backward()
    square(twin, inputs[0]).backward()
    torch.testing.assert_close(gradient(copied), 3 * gradient(twin))
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    pairs = [*zip(model.parameters(), twin.parameters(), copied.parameters(), strict=True)]
    assert all(torch.equal(ours, theirs) and not torch.equal(ours, other) for ours, theirs, other in pairs)

    expected = mean_of_rows(twin, inputs)
    if when in ("before", "after"):
        window(session, model, inputs)
    elif when == "within":
        with session.language("fr"):
            loss = square(model, inputs[1])
        (loss / 2).backward()
    assert_mean_of_rows(session, model, expected)
    assert session.moo.windows == (2 if when == "after" else 1)
    optimizer.step()


@pytest.mark.parametrize("make", [COPIES["deepcopy"], COPIES["torch.save"]])
def test_a_copy_can_be_registered_itself(make: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model()
    session = register(model)
    copied = make(model)
    other = register(copied, micro_steps=4)
    window(other, copied, batches(4))
    window(session, model, batches())
    assert_mean_of_rows(other, copied, mean_of_rows(tiny_model(), batches(4)))
    assert_mean_of_rows(session, model, mean_of_rows(tiny_model(), batches()))
    assert (session.moo.windows, other.moo.windows) == (1, 1)


def test_the_session_does_not_travel() -> None:
    """With an object that holds both, as trainers do."""
    model = tiny_model()
    trainer = {"model": model, "session": register(model)}
    for copied in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert not hasattr(copied["session"], "moo")
        square(copied["model"], batches()[0]).backward()
    assert trainer["session"].moo.windows == 0
