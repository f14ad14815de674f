"""From corpora to tensors: training sequences by language and held-out text, made once and kept in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bucketmoo_ds.apps.corpus import evaluate, gnome, libreoffice, pages, tokenizer
from bucketmoo_ds.apps.corpus.packing import pack
from bucketmoo_ds.apps.study.design import LIBREOFFICE, Scenario

HELD_OUT = 0.1
EVALUATION_BYTES = 10_000


@dataclasses.dataclass(frozen=True)
class Text:
    """Tensors of one corpus, vocabulary and sequence length.

    Args:
        sequences: `[N, T]` int64, training sequences of one language each; labels are the same numbers.
        languages: the name of each sequence's language.
        held_out: by language.
        vocabulary: how many tokens there are.
    """

    sequences: Tensor
    languages: list[str]
    held_out: dict[str, evaluate.EvaluationSet]
    vocabulary: int

    def rows(self, language: str, share: float = 1.0) -> list[int]:
        """Returns the numbers of the sequences of a language, or of the first share of them."""
        found = [row for row, name in enumerate(self.languages) if name == language]
        return found[: max(int(share * len(found)), 1)]


def load(scenario: Scenario, folder: Path, cache: Path) -> Text:
    """Returns the text of a scenario whose tokenizer is trained on it; makes it where `folder` has it not yet."""
    names = sorted({*scenario.languages, *scenario.base})
    made = folder / f"{scenario.corpus}-{scenario.vocabulary}-{scenario.sequence_length}-{'-'.join(names)}.pt"
    return kept(made, lambda: _made(scenario, names, cache))


def split(scenario: Scenario, names: Sequence[str], cache: Path) -> pages.Split:
    """Returns the pages of some languages, to train on and held out."""
    if scenario.corpus == LIBREOFFICE:
        corpus = libreoffice.read(libreoffice.fetch(cache, names), names)
    else:
        corpus = gnome.read(gnome.fetch(cache), names)
    return pages.split({name: corpus[name] for name in names}, HELD_OUT)


def tensors(
    parts: pages.Split, tokens: PreTrainedTokenizerBase, scenario: Scenario
) -> tuple[Tensor, list[str], dict[str, evaluate.EvaluationSet]]:
    """Returns sequences, their languages, and held-out text: see `Text`."""
    packed = pack(pages.texts(parts.training), tokens, scenario.sequence_length)
    held_out = {
        name: evaluate.prepare(name, texts, tokens, scenario.sequence_length, EVALUATION_BYTES)
        for name, texts in pages.texts(parts.held_out).items()
    }
    sequences = packed.with_format("torch")["input_ids"][:].to(torch.int64)
    return sequences, list(packed["language"]), held_out


def _made(scenario: Scenario, names: Sequence[str], cache: Path) -> Text:
    parts = split(scenario, names, cache)
    tokens = tokenizer.train(pages.texts(parts.training), scenario.vocabulary)
    return Text(*tensors(parts, tokens, scenario), len(tokens))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Returns what `make` has made, now or in an earlier call."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        torch.save(make(), temporary)
        temporary.rename(path)
    return torch.load(path, weights_only=False)
