"""One run of the study: train the base model in one arm, and measure it on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bucketmoo_ds as bm
from bucketmoo_ds.apps.corpus import evaluate
from bucketmoo_ds.apps.study import controls
from bucketmoo_ds.apps.study.design import Arm, Scenario
from bucketmoo_ds.apps.study.text import Text
from bucketmoo_ds.apps.training.settings import TrainingSettings

CLIPPED = 1.0  # of the gradient's norm
ALIKE = 1e9  # temperature of sampling: each language has a micro-batch in a window
LOOK_EVERY = 5  # windows, from one look at directions to the next
EVALUATION_BATCH = 16


def run(scenario: Scenario, arm: Arm, rate: float, seed: int, text: Text, model: nn.Module) -> dict[str, Any]:
    """Returns what a run has come to: held-out `bits_per_byte` by language, `seconds` of training, and means over
    windows of `cosine_mean`, of the combined gradient and the mean of the rows, and `cosine_update`, of the combined
    gradient and the step that the optimizer makes of it."""
    began = time.perf_counter()
    looks = train(model, text, scenario, arm, rate, seed)
    seconds = time.perf_counter() - began
    return {"bits_per_byte": measure(model, text, scenario), "seconds": round(seconds, 2), **looks}


def measure(model: nn.Module, text: Text, scenario: Scenario) -> dict[str, float]:
    """Returns held-out bits per byte by language."""
    sets = [text.held_out[language] for language in scenario.languages]
    return evaluate.bits_per_byte(evaluate.nll_sums(model, sets, EVALUATION_BATCH), sets)


def train(model: nn.Module, text: Text, scenario: Scenario, arm: Arm, rate: float, seed: int) -> dict[str, float]:
    """Trains in place; returns the two cosines of `run`."""
    torch.manual_seed(seed)
    weights = _static_weights(model, text, scenario, arm)
    model.train()
    settings = TrainingSettings(
        steps=scenario.steps,
        sequence_length=scenario.sequence_length,
        learning_rate=rate,
        warmup_steps=max(scenario.steps // 16, 1),
        seed=seed,
    )
    optimizers = _optimizers(model, scenario.optimizer, rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, settings.learning_rate_share) for each in optimizers]
    session = _session(model, scenario, arm, seed) if arm.rule is not None else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_mean, of_update = [], []
    windows = _windows(text, scenario, arm, seed)
    for step in range(scenario.steps):
        window = next(windows)
        if session is None:
            _plain_backward(model, window, weights)
        else:
            for language, sequences in window:
                (model(input_ids=sequences, labels=sequences, language=language).loss / len(window)).backward()
        looks = step % LOOK_EVERY == 0
        if looks:
            gradient = torch.cat([each.grad.flatten() for each in trained if each.grad is not None])
            before = torch.cat([parameter.detach().flatten() for parameter in trained])
        torch.nn.utils.clip_grad_norm_(trained, CLIPPED)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if looks:
            moved = before - torch.cat([parameter.detach().flatten() for parameter in trained])
            of_update.append(float(torch.cosine_similarity(gradient, moved, dim=0)))
            if session is not None:
                of_mean.append(_cosine_to_mean(session.last))
    if session is not None:
        session.close()
    found = {"cosine_update": of_update, "cosine_mean": of_mean}
    return {name: round(sum(each) / len(each), 4) for name, each in found.items() if each}


def _plain_backward(model: nn.Module, window: Sequence[tuple[str, Tensor]], weights: dict[str, float] | None) -> None:
    """The gradient of the window's mean loss, or of the languages' weighted mean losses, in one pass."""
    sequences = torch.cat([each for _, each in window])
    if weights is None:
        model(input_ids=sequences, labels=sequences).loss.backward()
        return
    languages = [language for language, each in window for _ in each]
    total = sum(weights[language] for language in set(languages))
    each = torch.tensor([weights[language] / total / languages.count(language) for language in languages])
    logits = model(input_ids=sequences).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean(1)
    (losses * each).sum().backward()


def _static_weights(model: nn.Module, text: Text, scenario: Scenario, arm: Arm) -> dict[str, float] | None:
    if not arm.share and not arm.loss:
        return None
    losses = measure(model, text, scenario) if arm.loss else {}
    sizes = {language: len(text.rows(language, scenario.sizes.get(language, 1.0))) for language in scenario.languages}
    return {
        language: sizes[language] ** arm.share * losses.get(language, 1.0) ** arm.loss
        for language in scenario.languages
    }


def _windows(text: Text, scenario: Scenario, arm: Arm, seed: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yields windows: the language and the sequences `[n, T]` of each micro-batch, the same for all arms of a seed, but
    for those that change `repeat`."""
    rows = [row for name in scenario.languages for row in text.rows(name, scenario.sizes.get(name, 1.0))]
    sampler = bm.LanguageBatchSampler(
        config=bm.BucketMOOConfig(languages=scenario.languages, enabled=arm.rule is not None),
        sample_languages=[text.languages[row] for row in rows],
        micro_batch_size=scenario.sequences,
        micro_steps=len(scenario.languages),
        temperature=ALIKE,
        repeat=arm.repeat,
        seed=seed,
    )
    window = []
    while True:
        for chosen in sampler:
            window.append((text.languages[rows[chosen[0]]], text.sequences[[rows[each] for each in chosen]]))
            if len(window) == len(scenario.languages):
                yield window
                window = []


def _session(model: nn.Module, scenario: Scenario, arm: Arm, seed: int) -> Any:
    controls.register()
    rule, options = str(arm.rule), dict(arm.options)
    if arm.late:
        rule, options = "late", {"rule": arm.rule, "options": options}
    config = bm.BucketMOOConfig(
        languages=scenario.languages,
        aggregator=rule,
        aggregator_options=options,
        granularity=arm.granularity,
        rescale=arm.rescale,
        seed=seed,
    )
    return bm.single.register(model, config, micro_steps=len(scenario.languages))


def _cosine_to_mean(resolution: Any) -> float:
    """Of the combined gradient of all blocks and the mean of the rows, from Grams and weights."""
    weights, gram = resolution.weights, resolution.gram
    even = resolution.mask.to(weights.dtype) / len(resolution.present)
    products = [
        float(torch.einsum("bi,bij,bj->", a, gram, b)) for a, b in ((weights, even), (weights, weights), (even, even))
    ]
    both = math.sqrt(max(products[1] * products[2], 0.0))
    return products[0] / both if both else 0.0


def _optimizers(model: nn.Module, name: str, rate: float) -> list[torch.optim.Optimizer]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in trained]
    if name == "sgd":
        return [torch.optim.SGD(parameters, lr=rate, momentum=0.9)]
    betas = (0.9, 0.999) if name == "adamw .9 .999" else (0.9, 0.95)
    if name == "muon":
        matrices = [each for name, each in trained if each.dim() == 2 and "embed" not in name]
        others = [each for each in parameters if all(each is not matrix for matrix in matrices)]
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=betas, weight_decay=0.0),
        ]
    return [torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=0.0)]
