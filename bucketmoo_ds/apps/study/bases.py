"""The models that runs begin from: small ones, trained here by averaging. Made once, kept in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bucketmoo_ds.apps.study import trial
from bucketmoo_ds.apps.study.design import ARMS, BASELINE, Scenario
from bucketmoo_ds.apps.study.text import Text
from bucketmoo_ds.apps.training.models import load_model
from bucketmoo_ds.apps.training.settings import ModelSettings

SIZES = {"small": (64, 2), "large": (192, 4)}
RATE = 4e-3
SLOTS = 4  # micro-batches in a window of the base's training, which has no conflicts to resolve


def load(scenario: Scenario, text: Text, folder: Path) -> torch.nn.Module:
    """Returns the base model of a scenario; trains it where `folder` has it not yet."""
    settings = _settings(scenario, text)
    name = hashlib.sha256(
        json.dumps([settings, dataclasses.astuple(scenario)[3:6]], sort_keys=True).encode()
    ).hexdigest()
    kept = folder / f"{scenario.model}-{name[:16]}"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            model = _trained(scenario, text, settings)
            model.save_pretrained(scratch)
            shutil.copytree(scratch, f"{scratch}-whole")
        Path(f"{scratch}-whole").rename(kept)
    return AutoModelForCausalLM.from_pretrained(kept)


def _settings(scenario: Scenario, text: Text) -> dict[str, Any]:
    hidden, layers = SIZES[scenario.model]
    return {
        "model_type": "gpt_neox",  # of the small architectures, the fastest on a CPU
        "vocab_size": text.vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": scenario.sequence_length,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _trained(scenario: Scenario, text: Text, settings: dict[str, Any]) -> Any:
    model = load_model(ModelSettings(config=settings), seed=0)
    plain = dataclasses.replace(
        scenario, languages=scenario.base, steps=scenario.base_steps, optimizer="adamw", sizes={},
        sequences=max(SLOTS // len(scenario.base), 1) * scenario.sequences,
    )  # fmt: skip
    trial.train(model, text, plain, ARMS[BASELINE], RATE, seed=10_000)
    return model
