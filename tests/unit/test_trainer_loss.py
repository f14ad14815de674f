"""What transformers' Trainer says about its losses, for every way in which they can be made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import bucketmoo_ds as bm
from bucketmoo_ds.errors import LanguageError

LANGUAGES = ["de", "fr"]
VOCABULARY, MICRO_STEPS = 11, 4


class Toy(nn.Module):
    """Logits of each token by itself; the loss is that of transformers' models, or ignores `num_items_in_batch`."""

    def __init__(self, ignores: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.config = SimpleNamespace()
        self.ignores = ignores

    def forward(self, input_ids: Tensor, labels: Any = None, num_items_in_batch: Any = None, **_: Any) -> Any:
        logits = self.table(input_ids)
        loss = None if labels is None else summed(logits, labels, None if self.ignores else num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)


def summed(logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    reduction = "mean" if items is None else "sum"
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
    return loss if items is None else loss / items


def by_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return summed(outputs.logits, labels, num_items_in_batch)


class Plain(Trainer):
    pass


class Logging(Trainer):
    """Overrides `compute_loss`, but lets Trainer make the loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Own(Trainer):
    """Makes the loss outside of the model, as TRL does."""

    divides = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], language=inputs["language"]).logits
        return summed(logits, inputs["labels"], num_items_in_batch if self.divides else None)


class OwnMean(Own):
    divides = False


def stating(base: type, scaled: bool) -> type:
    return type(base.__name__, (base,), {"loss_is_scaled_for_ga": scaled})


def rows(seed: int) -> list[dict[str, Any]]:
    """Micro-batches of two rows each, in turn of one language and the other, with different numbers of targets."""
    source = torch.Generator().manual_seed(seed)
    found = []
    for index in range(2 * MICRO_STEPS):
        ids = torch.randint(VOCABULARY, (9,), generator=source)
        labels = ids.clone()
        labels[: int(torch.randint(0, 7, (1,), generator=source))] = -100
        found.append({"input_ids": ids, "labels": labels, "language": index // 2 % 2})
    return found


def mean_row(model: Toy, data: list[dict[str, Any]], smoothing: float) -> Tensor:
    """The mean of the rows of docs/theory.md, section 2, in float64.

    Trainer's smoother does not shift the labels of a model that transformers has no causal name for."""
    shift = 0 if smoothing else 1
    weight, found = model.table.weight.detach().double().requires_grad_(), []
    for language in range(2):
        of_it = [row for row in data if row["language"] == language]
        ids, labels = (torch.stack([row[name] for row in of_it]) for name in ("input_ids", "labels"))
        logits = nn.functional.embedding(ids, weight)[:, : 9 - shift].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, shift:].flatten(), label_smoothing=smoothing)
        found.append(torch.autograd.grad(loss, weight)[0])
    return sum(found) / 2


def train(
    tmp_path: Any, base: type, model: Toy, data: list[dict[str, Any]], smoothing: float = 0.0, **rest: Any
) -> Any:
    """Trains one window; returns the gradient that the optimizer saw."""
    config = bm.BucketMOOConfig(languages=LANGUAGES, aggregator="mean", granularity="model")
    session = bm.single.register(model, config, micro_steps=MICRO_STEPS)
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(model.table.weight.grad.double())

    class InOrder(base):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_size=2)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_STEPS,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        label_smoothing_factor=smoothing,
    )
    optimizers = (Watched(model.parameters(), lr=0.0), None)
    InOrder(model=model, args=arguments, train_dataset=data, optimizers=optimizers, **rest).train()
    session.close()
    return seen[0]


def accepting(model: Toy, accepts: bool) -> Toy:
    model.accepts_loss_kwargs = accepts
    return model


RIGHT = {
    "the model's loss": (Plain, Toy, {}),
    "the model's mean": (Plain, lambda: accepting(Toy(), False), {}),
    "ignored, and said so": (Plain, lambda: accepting(Toy(ignores=True), False), {}),
    "an override that logs": (Logging, Toy, {}),
    "label smoothing": (Plain, Toy, {"smoothing": 0.1}),
    "label smoothing of means": (Plain, lambda: accepting(Toy(), False), {"smoothing": 0.1}),
    "a function, stated": (stating(Plain, True), Toy, {"compute_loss_func": by_function}),
    "one's own sum, stated": (stating(Own, True), Toy, {}),
    "one's own mean, stated": (stating(OwnMean, False), Toy, {}),
    "one's own mean, nothing passed on": (OwnMean, lambda: accepting(Toy(), False), {}),
}

REFUSED = {
    "ignored": (Plain, lambda: Toy(ignores=True), {}, "Toy is told num_items_in_batch and returns the mean"),
    "a function": (
        Plain,
        Toy,
        {"compute_loss_func": by_function},
        "compute_loss_func makes the loss, and nothing tells",
    ),
    "one's own sum": (Own, Toy, {}, "compute_loss makes the loss, and nothing tells"),
    "one's own mean": (OwnMean, Toy, {}, "compute_loss makes the loss, and nothing tells"),
    "a mean that is divided": (stating(Plain, False), Toy, {}, "hands num_items_in_batch on"),
}
if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # transformers 4
    REFUSED["a mean that is divided"] = (*REFUSED["a mean that is divided"][:3], "does not read it, and would not")
    for case, said in (("label smoothing", "label smoother of"), ("one's own mean, stated", "would not divide")):
        REFUSED[case] = (*RIGHT.pop(case), said)


@pytest.mark.parametrize("name", RIGHT)
def test_the_gradient_is_the_mean_of_the_rows(tmp_path: Any, name: str) -> None:
    base, make, settings = RIGHT[name]
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    model, data = make(), rows(seed)
    expected = mean_row(model, data, settings.get("smoothing", 0.0))
    found = train(tmp_path, base, model, data, **settings)
    # float32 on one side: some roundings of 6e-8 each, in sums over 32 targets.
    assert (found - expected).norm() < 2e-6 * expected.norm(), f"seed {seed}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_knows_is_refused(tmp_path: Any, name: str) -> None:
    base, make, settings, message = REFUSED[name]
    with pytest.raises(LanguageError, match=message):
        train(tmp_path, base, make(), rows(5), **settings)


def test_a_trainer_that_does_not_average_over_devices_divides_by_its_own_tokens() -> None:
    """Two ranks: Trainer multiplies by them only where the tokens of all are counted."""
    from bucketmoo_ds.integrations.trainer_loss import TrainerLoss

    for averages, expected in ((True, 20.0), (False, 40.0)):
        trainer = SimpleNamespace(
            args=SimpleNamespace(average_tokens_across_devices=averages),
            accelerator=SimpleNamespace(num_processes=2),
            get_tp_size=lambda: 1,
            compute_loss_func=None,
            label_smoother=None,
            model_accepts_loss_kwargs=True,
        )
        loss = TrainerLoss(trainer, {}, torch.tensor(40.0))
        loss.by_trainer = True
        assert loss.divisor() == expected
