"""What the quickstart runs: the model, the runs, and their settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bucketmoo_ds.apps.corpus.pages import ENGLISH
from bucketmoo_ds.apps.training.models import small_model
from bucketmoo_ds.apps.training.settings import TrainingSettings

BASELINE = "averaging"

# MGDA follows the smallest gradients, so its combined gradient is short: rescaled to the mean's norm, averaging's
# learning rate stays meaningful. The other rules are on averaging's scale by definition.
RESCALE = {"mgda": "mean"}

# Temperature of sampling: as many sequences of each language in a window, as where each has a micro-batch.
ALIKE = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """All settings of a quickstart; kept as `settings.json` in its folder.

    Args:
        base: the language that the base model is trained on, before it is fine-tuned.
        seen: languages of the fine-tuning, each in every window.
        unseen: languages that neither the tokenizer nor the training sees.
        methods: `averaging` (plain DeepSpeed) and aggregators of bucket MOO.
        seeds: each method runs once with each; a seed decides the order of the data.
        steps: of fine-tuning. base_steps: of the base's training before it.
        learning_rate: of fine-tuning, one for all methods and tuned for none of them (see docs/tuning.md).
        base_learning_rate: of the base.
        sequences: of `sequence_length` tokens in a micro-batch.
        mode: `exact`: a micro-batch a language, every window resolved on its own rows. `mixed`: the same sequences in
            micro-batches of all languages, one a window on each rank.
        processes: ranks.
        bucket_size: elements of a bucket, `reduce_bucket_size`.
    """

    base: str = ENGLISH
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    methods: tuple[str, ...] = (BASELINE, "mgda", "cagrad")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 80
    base_steps: int = 120
    learning_rate: float = 8e-3
    base_learning_rate: float = 4e-3
    sequence_length: int = 128
    sequences: int = 3
    processes: int = 2
    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 4
    mode: str = "exact"
    granularity: str = "bucket"
    bucket_size: int = 150_000
    evaluation_bytes: int = 10_000
    held_out: float = 0.1

    @property
    def micro_steps(self) -> int:
        """Micro-steps of a window: every language has a slot."""
        return -(-len(self.seen) // self.processes)

    def model_config(self, vocabulary: int) -> dict[str, Any]:
        """Returns the transformers configuration of the model: 1.3 million parameters at the defaults."""
        return small_model(vocabulary, self.hidden, self.layers, self.sequence_length)

    def deepspeed(self, method: str, languages: tuple[str, ...], micro_steps: int) -> dict[str, Any]:
        """Returns the DeepSpeed JSON of a method; `averaging` is plain DeepSpeed."""
        mixed = self.mode == "mixed"
        return {
            "train_micro_batch_size_per_gpu": self.sequences * (micro_steps if mixed else 1),
            "gradient_accumulation_steps": 1 if mixed else micro_steps,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": self.bucket_size},
            "steps_per_print": 10**9,
            "bucket_moo": {
                "enabled": method != BASELINE,
                "aggregator": "mean" if method == BASELINE else method,
                "mode": "mixed" if mixed else "auto",
                "granularity": self.granularity,
                "rescale": RESCALE.get(method, "none"),
                "languages": list(languages),
            },
        }

    def training(self, seed: int) -> TrainingSettings:
        """Returns the settings of a fine-tuning run."""
        return TrainingSettings(
            steps=self.steps,
            sequence_length=self.sequence_length,
            learning_rate=self.learning_rate,
            warmup_steps=max(self.steps // 16, 1),
            temperature=ALIKE,
            evaluate_every=max(self.steps // 2, 1),
            seed=seed,
        )

    def base_training(self) -> TrainingSettings:
        """Returns the settings of the base's training."""
        return TrainingSettings(
            steps=self.base_steps,
            sequence_length=self.sequence_length,
            learning_rate=self.base_learning_rate,
            warmup_steps=max(self.base_steps // 16, 1),
            checkpoint_at_end=False,
        )

    def save(self, folder: Path) -> None:
        """Writes `settings.json`."""
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> QuickstartSettings:
        """Reads `settings.json`."""
        raw: dict[str, Any] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        for name, value in raw.items():
            raw[name] = tuple(value) if isinstance(value, list) else value
        return cls(**raw)
