"""The models that runs begin from: small ones, trained here by averaging. Made once, kept in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bucketmoo_ds.apps.corpus.fetching import fetch_once
from bucketmoo_ds.apps.study import trial
from bucketmoo_ds.apps.study.design import ARMS, BASELINE, Scenario
from bucketmoo_ds.apps.study.text import Text
from bucketmoo_ds.apps.training.models import load_model, small_model
from bucketmoo_ds.apps.training.settings import ModelSettings

SIZES = {"small": (64, 2), "large": (192, 4)}
RATE = 4e-3
SLOTS = 4  # micro-batches in a window of the base's training, which has no conflicts to resolve


def load(scenario: Scenario, text: Text, folder: Path) -> torch.nn.Module:
    """Returns the base model of a scenario; trains it where `folder` has it not yet."""
    settings = small_model(text.vocabulary, *SIZES[scenario.model], scenario.sequence_length)
    of = [settings, scenario.corpus, scenario.languages, scenario.base, scenario.base_steps, scenario.sequences]
    name = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).hexdigest()
    kept = folder / f"{scenario.model}-{name}"
    return AutoModelForCausalLM.from_pretrained(
        fetch_once(kept, lambda made: _trained(scenario, text, settings).save_pretrained(made))
    )


def _trained(scenario: Scenario, text: Text, settings: dict[str, Any]) -> Any:
    model = load_model(ModelSettings(config=settings), seed=0)
    plain = dataclasses.replace(
        scenario, languages=scenario.base, steps=scenario.base_steps, optimizer="adamw", sizes={},
        sequences=max(SLOTS // len(scenario.base), 1) * scenario.sequences,
    )  # fmt: skip
    trial.train(model, text, plain, ARMS[BASELINE], RATE, seed=10_000)
    return model
