"""The model and tokenizer of a run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bucketmoo_ds.apps.training.settings import ModelSettings
from bucketmoo_ds.errors import ConfigError


def small_model(vocabulary: int, hidden: int, layers: int, positions: int) -> dict[str, Any]:
    """Returns the transformers configuration of a causal model that two CPU cores train in minutes."""
    return {
        "model_type": "gpt_neox",  # of the small architectures, the fastest on a CPU
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def load_model(settings: ModelSettings, seed: int) -> torch.nn.Module:
    """Returns a causal language model, loaded or with random weights from `seed`.

    Raises:
        ConfigError: the model cannot be found or made.
    """
    try:
        if settings.name is not None:
            return AutoModelForCausalLM.from_pretrained(settings.name, dtype=torch.float32)
        config = AutoConfig.for_model(**dict(settings.config or {}))
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Returns the tokenizer.

    Raises:
        ConfigError: none is named, or it cannot be found.
    """
    name = settings.tokenizer or settings.name
    if name is None:
        raise ConfigError("model.tokenizer: missing; a model made from a config needs a tokenizer by folder or name")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer = {name!r}: {error}") from error
    return tokenizer
