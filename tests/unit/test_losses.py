"""The languages' losses: what a micro-step knows of its own, and what a window makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import bucketmoo_ds as bm
from bucketmoo_ds import reference
from bucketmoo_ds.data.batch import Entries, LanguageTracker, Slot, stating
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.plan.choices import create_aggregator

LANGUAGES = ("de", "fr", "ko")


def config(**changes: Any) -> bm.BucketMOOConfig:
    return bm.BucketMOOConfig(**{"languages": LANGUAGES, "normalize": "loss", "aggregator": "upgrad"} | changes)


@dataclasses.dataclass
class Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "the loss": lambda loss: loss,
    "a ModelOutput": lambda loss: Output(loss=loss, logits=torch.zeros(2)),
    "a dictionary": lambda loss: {"logits": torch.zeros(2), "loss": loss},
    "a tuple": lambda loss: (loss, torch.zeros(2)),
    "an object": lambda loss: SimpleNamespace(loss=loss),
}


def slot_after(
    output: Callable[[Tensor], Any] = FORMS["the loss"],
    *,
    through: bool = True,
    told: float | None = None,
    world_size: int = 1,
    passes: int = 1,
    **entries: Any,
) -> Slot | LanguageError:
    """The slot of forward passes whose losses are 3, 4, ..., and of the backward through them."""
    tracker = LanguageTracker(config())
    total = torch.zeros(())
    for number in range(passes):
        loss = torch.tensor(3.0 + number, requires_grad=True) * 1.0
        tracker.note(Entries(language="fr", **entries), training=True, output=output(loss))
        total = total + (loss if through else loss.detach().requires_grad_())
    (total / 7).backward()
    if told is not None:
        tracker.tell_loss(torch.tensor(told))
    return tracker.slot(4, world_size)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_is_scaled_in_place_is_the_one_the_model_returned(form: str) -> None:
    tracker = LanguageTracker(config())
    loss = torch.tensor(3.0, requires_grad=True) * 1.0
    tracker.note(Entries(language="fr", target_tokens=5), training=True, output=FORMS[form](loss))
    loss *= 8
    loss /= 4
    loss.backward()
    assert summed(tracker.slot(4, 2)) == 15.0


def summed(slot: Slot | LanguageError) -> float:
    assert isinstance(slot, Slot), slot
    assert slot.loss is not None
    return float(slot.loss)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_returns_its_mean_loss(form: str) -> None:
    assert summed(slot_after(FORMS[form], target_tokens=5)) == 15.0


def test_how_a_loss_was_divided_is_known() -> None:
    assert summed(slot_after()) == 3.0, "no tokens told: each pass counts as one"
    assert summed(slot_after(passes=3)) == 3.0 + 4.0 + 5.0
    assert summed(slot_after(passes=2, target_tokens=5)) == 5 * (3.0 + 4.0)
    # The model divides by the window's tokens, and what it returns is multiplied by the ranks.
    assert summed(slot_after(target_tokens=5, num_items=40, world_size=2)) == 3.0 * 40
    assert summed(slot_after(target_tokens=5, told=2.5)) == 2.5 * 5
    assert summed(slot_after(target_tokens=5, told=2.5, loss_divisor=80, through=False)) == 2.5 * 5
    trainer = SimpleNamespace(entries=Entries(), divisor=lambda: 20.0)
    with stating(trainer):
        assert summed(slot_after(target_tokens=5, num_items=40)) == 3.0 * 40
    empty = slot_after(target_tokens=0)
    assert isinstance(empty, Slot)
    assert empty.loss is None, "the mean of no token"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"through": False}, "backward went through no loss that the model returned: tell it before backward"),
        ({"output": lambda loss: {"logits": loss.expand(4, 2)}}, "backward went through no loss"),
        ({"target_tokens": 5, "loss_divisor": 80}, "a sum divided by 80 nothing tells how much .*tell_loss"),
    ],
)
def test_a_loss_that_nobody_knows_is_refused(how: dict[str, Any], message: str) -> None:
    found = slot_after(**how)
    with pytest.raises(LanguageError, match=message):
        raise found if isinstance(found, LanguageError) else AssertionError(found)


def test_a_told_loss_is_for_one_backward_and_has_to_be_a_number() -> None:
    tracker = LanguageTracker(config())
    for told in (torch.zeros(2), "3"):
        with pytest.raises(LanguageError, match=r"expected one number|expected a number"):
            tracker.tell_loss(told)  # type: ignore[arg-type]
    tracker.tell_loss(2.0)
    tracker.note(Entries(language="de"), training=True)
    assert summed(tracker.slot(1, 1)) == 2.0
    tracker.note(Entries(language="de"), training=True)
    assert isinstance(tracker.slot(1, 1), LanguageError)


class Model(nn.Module):
    """Returns its loss, or its outputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(inputs)
        return {"logits": logits} if labels is None else {"loss": loss_of(logits, labels), "logits": logits}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("settings", "tells"),
    [
        ({"normalize": "loss"}, False),
        ({"normalize": "loss_l2", "aggregator": "mgda", "rescale": "mean"}, True),
        ({"normalize": "none", "aggregator": "stch", "aggregator_options": {"mu": 0.3}}, False),
        ({"normalize": "none", "aggregator": "cagrad", "aggregator_options": {"clip_to_preference": True}}, False),
    ],
)
def test_a_window_equals_the_reference(settings: dict[str, Any], tells: bool) -> None:
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    torch.manual_seed(seed)
    model, chosen = Model(), config(preference={"ko": 1.0, "de": 3.0, "fr": 0.5}, **settings)
    session = bm.single.register(model, chosen, micro_steps=4, bucket_size=20)
    micros = []
    for language, rows in ((0, 3), (2, 6), (1, 4), (0, 8)):
        inputs, labels = torch.randn(rows, 4), torch.randint(5, (rows,))
        plain = Model()
        plain.load_state_dict(model.state_dict())
        loss = plain(inputs, labels)["loss"]
        (loss / 4).backward()
        gradient = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
        micros.append(reference.MicroGradient(language, rows, gradient, float(loss.detach())))
        with session.language(LANGUAGES[language], target_tokens=rows):
            made = loss_of(model(inputs)["logits"], labels) if tells else model(inputs, labels)["loss"]
            if tells:
                session.tell_loss(made)
            (made / 4).backward()
    plan, last = session.moo.plan, session.last
    assert last is not None
    blocks = {
        block: [each.name for each, of in zip(plan.parameters, plan.block_of, strict=True) if of == number]
        for number, block in enumerate(plan.blocks)
    }
    _, weights = reference.resolve_window(
        micros, blocks, micro_steps=4, aggregator=create_aggregator(chosen), preference=[3.0, 0.5, 1.0],
        normalize=chosen.normalize, rescale=chosen.rescale,
    )  # fmt: skip
    for number, block in enumerate(blocks):
        # Rows of float32, on Grams of few elements that may be as ill-conditioned as 1e4.
        torch.testing.assert_close(last.weights[number], weights[block], rtol=2e-3, atol=2e-3)
    if last.losses is not None:
        tokens = {language: sum(m.target_tokens for m in micros if m.language == language) for language in range(3)}
        for language, loss in enumerate(last.losses):
            expected = sum(m.target_tokens * m.loss for m in micros if m.language == language) / tokens[language]
            assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", [{"normalize": "loss_l2"}, {"normalize": "none", "aggregator": "stch"}])
def test_the_mixed_mode_refuses_what_needs_losses(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs each language's loss .* these are decided before"):
        bm.mixed.register(Model(), config(mode="mixed", **settings), micro_steps=1)
