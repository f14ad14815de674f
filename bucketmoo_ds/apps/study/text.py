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
from bucketmoo_ds.apps.corpus.pages import Corpus
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


def corpus_of(scenario: Scenario, names: Sequence[str], cache: Path) -> Corpus:
    """Returns the pages of some languages."""
    if scenario.corpus == LIBREOFFICE:
        fetched = [name for name in names if name != pages.ENGLISH]
        return libreoffice.read(libreoffice.fetch(cache, fetched), names)
    return gnome.read(gnome.fetch(cache), names)


def tensors(
    corpus: Corpus, names: Sequence[str], tokens: PreTrainedTokenizerBase, scenario: Scenario
) -> tuple[Tensor, list[str], dict[str, evaluate.EvaluationSet]]:
    """Returns sequences, their languages, and held-out text: see `Text`."""
    split = pages.split({name: corpus[name] for name in names}, HELD_OUT)
    packed = pack(pages.texts(split.training, names), tokens, scenario.sequence_length)
    held_out = {
        name: evaluate.prepare(name, texts, tokens, scenario.sequence_length, EVALUATION_BYTES)
        for name, texts in pages.texts(split.held_out, names).items()
    }
    sequences = packed.with_format("torch")["input_ids"][:].to(torch.int64)
    return sequences, list(packed["language"]), held_out


def _made(scenario: Scenario, names: Sequence[str], cache: Path) -> Text:
    corpus = corpus_of(scenario, names, cache)
    training = pages.texts(pages.split({name: corpus[name] for name in names}, HELD_OUT).training, names)
    tokens = tokenizer.train(training, scenario.vocabulary)
    return Text(*tensors(corpus, names, tokens, scenario), len(tokens))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Returns what `make` has made, now or in an earlier call."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        torch.save(make(), temporary)
        temporary.rename(path)
    return torch.load(path, weights_only=False)
