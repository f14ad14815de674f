"""Text to tensors, before any rank starts: corpus, split, tokenizer, packed training data, held-out texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerFast

from bucketmoo_ds.apps.corpus import evaluate, pages, sources, tokenizer
from bucketmoo_ds.apps.corpus.packing import pack
from bucketmoo_ds.apps.quickstart.settings import QuickstartSettings


def prepare(quickstart: QuickstartSettings, data: Path | None, cache: Path, folder: Path) -> dict[str, Any]:
    """Writes everything the ranks read below `folder`; returns where the text came from and how much there is.

    The tokenizer is trained on the base's and the seen languages; of the unseen ones only held-out pages are kept.
    """
    wanted = list(dict.fromkeys([quickstart.base, *quickstart.seen, *quickstart.unseen]))
    corpus, provenance = sources.quickstart_corpus(data, cache, wanted)
    split = pages.split(corpus, quickstart.held_out)
    trained = list(dict.fromkeys([quickstart.base, *quickstart.seen]))
    texts = pages.texts(split.training, trained)
    tokens = tokenizer.train(texts, quickstart.vocabulary)
    tokenizer.save(tokens, folder / "tokenizer")
    for name, languages in (("base", [quickstart.base]), ("seen", list(quickstart.seen))):
        chosen = {language: texts[language] for language in languages}
        pack(chosen, tokens, quickstart.sequence_length).save_to_disk(str(folder / "data" / name))
    held_out = pages.texts(split.held_out, [*quickstart.seen, *quickstart.unseen])
    (folder / "data" / "held_out.json").write_text(json.dumps(held_out, ensure_ascii=False), encoding="utf-8")
    counted = pages.stats(split.training)
    description = dataclasses.asdict(provenance) | {
        "training_bytes": {language: counted[language].bytes for language in trained},
        "training_pages": {language: counted[language].pages for language in trained},
    }
    (folder / "corpus.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    return description


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that `prepare` trained."""
    return tokenizer.load(folder / "tokenizer")


def load_data(folder: Path, name: str) -> Dataset:
    """Returns packed training data, `base` or `seen`."""
    return load_from_disk(str(folder / "data" / name))


def load_evaluation(folder: Path, quickstart: QuickstartSettings) -> list[evaluate.EvaluationSet]:
    """Returns the held-out text of every language, seen and unseen."""
    tokens = load_tokenizer(folder)
    texts = json.loads((folder / "data" / "held_out.json").read_text(encoding="utf-8"))
    return [
        evaluate.prepare(language, texts[language], tokens, quickstart.sequence_length, quickstart.evaluation_bytes)
        for language in (*quickstart.seen, *quickstart.unseen)
    ]
