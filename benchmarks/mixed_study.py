"""Does it cost anything that the weights of mode `mixed` come from Grams of earlier windows? One process, paired seeds.

    python benchmarks/mixed_study.py --out benchmarks/results/mixed-study-cpu.json [--minutes 5]

The text, architecture and optimizer of `bucketmoo quickstart`, smaller. All arms of a seed begin at one base model and
see the same sequences in the same windows:

    averaging           the plain gradient of the window
    exact RULE          a micro-batch a language, every window resolved on its own rows (`single.register`)
    late RULE           the same, with the weights of the window before: what the delay alone costs
    mixed RULE, R = n   all languages in one micro-batch, Grams every n windows (`mixed.register`)

The file is written after every run, and a call goes on where the last one has ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import bucketmoo_ds as bm
from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.corpus import evaluate
from bucketmoo_ds.apps.corpus.packing import pad
from bucketmoo_ds.apps.corpus.sources import SEEN_LANGUAGES
from bucketmoo_ds.apps.quickstart import prepare
from bucketmoo_ds.apps.quickstart.settings import QuickstartSettings
from bucketmoo_ds.apps.study import controls
from bucketmoo_ds.apps.training.loop import _optimizer as adamw
from bucketmoo_ds.apps.training.models import load_model
from bucketmoo_ds.apps.training.settings import ModelSettings, TrainingSettings

RULES = ("cagrad", "upgrad")
CLIPPED = 1.0  # of the gradient's norm, as in the quickstart
GRANULARITY = "layer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: the plain gradient (`rule` is `None`), or a rule, `exact`, `late` or `mixed`.

    Args:
        gram_every: of mode `mixed`.
        micro_batches: of mode `mixed`, how many a window is cut into.
    """

    rule: str | None = None
    mode: str = "averaging"
    gram_every: int = 1
    micro_batches: int = 1

    @property
    def name(self) -> str:
        """A name that no other arm has."""
        if self.mode != "mixed":
            return " ".join(filter(None, (self.mode, self.rule)))
        small = f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"mixed {self.rule}, R = {self.gram_every}{small}"


def arms(every: list[int]) -> list[Arm]:
    """Returns the arms that are compared."""
    return [
        Arm(),
        *(Arm(rule=rule, mode=mode) for mode in ("exact", "late") for rule in RULES),
        *(Arm(rule=rule, mode="mixed", gram_every=number) for number in every for rule in RULES),
    ]


# What it costs that a micro-batch is small, so that few sequences meet in it; made last.
SMALL = [Arm(rule=rule, mode="mixed", gram_every=8, micro_batches=4) for rule in RULES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the result goes, as JSON")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no run begins (default: all are made)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), metavar="SEED")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, nargs="+", default=[8, 1, 16, 4], help="windows from Gram to Gram")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bucketmoo_ds", help="fetched text")
    parser.add_argument("--folder", type=Path, default=Path("runs/mixed-study"), help="data and base model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    controls.register()  # "late"
    began = time.monotonic()
    quickstart = QuickstartSettings(
        seen=SEEN_LANGUAGES,
        unseen=(),
        steps=options.steps,
        sequences=2,
        sequence_length=64,
        processes=1,
        vocabulary=1024,
        hidden=64,
        layers=2,
    )
    study = Study(quickstart, options.folder, options.cache)
    settings = json.loads(json.dumps(dataclasses.asdict(quickstart))) | {"granularity": GRANULARITY}
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if result.get("settings", settings) != settings:
        parser.error(f"--out {options.out}: holds runs of other settings")
    result = {
        "values": {},
        "command": "python benchmarks/mixed_study.py",
        **result,
        "settings": settings,
        "corpus": study.corpus,
        "base": study.base_values,
    }
    for chosen, seed in itertools.product((arms(options.every), SMALL), options.seeds):
        for arm in chosen:
            values = result["values"].setdefault(arm.name, {})
            if str(seed) in values or time.monotonic() - began > 60 * options.minutes:
                continue
            values[str(seed)] = study.run(arm, seed)
            print(f"{time.monotonic() - began:.0f} s: seed {seed}, {arm.name}: {values[str(seed)]}", flush=True)
            result = provenance.describe(("torch", "transformers")) | result
            temporary = options.out.with_suffix(".part")
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            temporary.rename(options.out)


class Study:
    """The data and the base model; both are made once and kept in a folder."""

    def __init__(self, quickstart: QuickstartSettings, folder: Path, cache: Path) -> None:
        self.quickstart = quickstart
        self._folder = folder
        if not (folder / "corpus.json").exists():
            prepare.prepare(quickstart, None, cache, folder)
        self.corpus = json.loads((folder / "corpus.json").read_text())
        self._data = prepare.load_data(folder, "seen")
        self._sets = prepare.load_evaluation(folder, quickstart)
        if not (folder / "base").exists():
            vocabulary = len(prepare.load_tokenizer(folder))
            base = load_model(ModelSettings(config=quickstart.model_config(vocabulary)), seed=0)
            data = prepare.load_data(folder, "base")
            windows = self._windows(data, (quickstart.base,), len(SEEN_LANGUAGES) // 2, seed=0)
            train(base, windows, quickstart.base_training(), Arm(), config=None)
            base.save_pretrained(folder / "base")
        self.base_values = self._mean(self._base())

    def run(self, arm: Arm, seed: int) -> dict[str, float]:
        """Returns what an arm has come to: bits per byte (the languages' mean), seconds of training, the largest weight
        of a language in any block and window, and the share of those in which some weight was above 1."""
        model = self._base()
        began = time.perf_counter()
        windows = self._windows(self._data, self.quickstart.seen, len(self.quickstart.seen), seed)
        options: dict[str, Any] = {"aggregator": "late", "aggregator_options": {"rule": arm.rule}}
        if arm.mode != "late":
            options = {"aggregator": arm.rule or "mean", "gram_every": arm.gram_every}
        config = bm.BucketMOOConfig(languages=self.quickstart.seen, granularity=GRANULARITY, **options)
        largest = train(model, windows, self.quickstart.training(seed), arm, config)
        seconds = time.perf_counter() - began
        return {
            "bits_per_byte": self._mean(model),
            "seconds": round(seconds, 1),
            "largest_weight": float(largest.max()),
            "above_one": float((largest > 1).double().mean()),
        }

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._folder / "base")

    def _mean(self, model: torch.nn.Module) -> float:
        found = evaluate.bits_per_byte(evaluate.nll_sums(model, self._sets, 16), self._sets)
        return sum(found.values()) / len(found)

    def _windows(
        self, data: Any, languages: tuple[str, ...], micro_steps: int, seed: int
    ) -> Iterator[list[tuple[str, dict[str, Tensor]]]]:
        """Yields windows: the language and the tensors of each micro-batch."""
        sampler = bm.LanguageBatchSampler(
            data, languages=languages, micro_batch_size=self.quickstart.sequences, micro_steps=micro_steps, seed=seed
        )
        of_row, tensors = data.with_format(None)["language"], data.with_format("torch", ["input_ids", "labels"])
        while True:
            window = []
            for rows in sampler:
                window.append((of_row[rows[0]], pad(tensors[rows])))
                if len(window) == micro_steps:
                    yield window
                    window = []


def train(
    model: torch.nn.Module,
    windows: Iterator[list[tuple[str, dict[str, Tensor]]]],
    settings: TrainingSettings,
    arm: Arm,
    config: bm.BucketMOOConfig | None,
) -> Tensor:
    """Trains in place; returns the largest weight of each window and block."""
    model.train()
    optimizer = adamw(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_share)
    session: Any = None
    if arm.mode == "mixed":
        session = bm.mixed.register(model, config, micro_steps=arm.micro_batches)
    elif arm.mode != "averaging":
        session = bm.single.register(model, config, micro_steps=len(config.languages))
    shuffle = torch.Generator().manual_seed(settings.seed)
    largest = []
    for _ in range(settings.steps):
        batches = _cut(next(windows), arm, shuffle)
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if session is not None:
            largest.append(session.last.weights.amax(-1))
    if session is not None:
        session.close()
    return torch.stack(largest) if largest else torch.zeros(1, 1)


def _cut(window: list[tuple[str, dict[str, Tensor]]], arm: Arm, shuffle: torch.Generator) -> list[dict[str, Any]]:
    """The micro-batches of a window, as the arm sees them."""
    if arm.mode in ("exact", "late"):
        return [{**batch, "language": language} for language, batch in window]
    whole = {name: torch.cat([batch[name] for _, batch in window]) for name in window[0][1]}
    if arm.mode == "averaging":
        return [whole]
    languages = [language for language, batch in window for _ in batch["input_ids"]]
    order = torch.randperm(len(languages), generator=shuffle)
    return [
        {**{name: each[rows] for name, each in whole.items()}, "language": [languages[row] for row in rows.tolist()]}
        for rows in order.chunk(arm.micro_batches)
    ]


if __name__ == "__main__":
    main()
