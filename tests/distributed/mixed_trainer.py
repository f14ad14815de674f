"""Worker: transformers' Trainer with languages, mixed in every batch or not, under DDP and DeepSpeed."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import toy
import worker
from accelerate.state import AcceleratorState, GradientState, PartialState
from setup_engine import LANGUAGES, settings
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import bucketmoo_ds

WINDOWS = 3
MICRO_STEPS = 2


class Languages(bucketmoo_ds.LanguageTrainerMixin, Trainer):
    """What a user writes."""


class Rows(Dataset[dict[str, Any]]):
    """Samples of all languages, with different numbers of targets, in random order."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for language in torch.randint(len(LANGUAGES), (40,), generator=generator).tolist():
            batch = toy.micro_batch(language, generator, ragged=True)
            self.rows.append({"language": LANGUAGES[language]} | {name: value[0] for name, value in batch.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def run(*, stage: int | None, moo: dict[str, Any] | None, seed: int, mode: str = "mixed") -> dict[str, Any]:
    """Returns the parameters after `WINDOWS` windows under DDP, or a stage of ZeRO, and what was logged."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=toy.VOCABULARY, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2
        )
    )
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    zero = settings(stage or 2, micro_steps=MICRO_STEPS, moo=None)
    config = None if stage is None else zero | {"gradient_clipping": 0.0}  # left out, it is 1
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false" if config is None else "true"
    PartialState(backend="gloo", cpu=config is None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Languages(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                deepspeed=config,
                use_cpu=config is None,
                accelerator_config={"use_configured_state": True},
                max_steps=WINDOWS,
                per_device_train_batch_size=zero["train_micro_batch_size_per_gpu"],
                gradient_accumulation_steps=MICRO_STEPS,
                optim="sgd",
                learning_rate=0.1,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="steps",
                logging_steps=WINDOWS,
                report_to=[],
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=Rows(seed),
            data_collator=collate,
            moo=None if moo is None else bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, gram_every=1, **moo),
            mode=mode,
        )
        trainer.train()
        session = trainer.moo
        return {
            "type": type(trainer.model_wrapped).__name__,
            "parameters": torch.cat([each.double().flatten() for each in worker.weights(trainer.model)]),
            "windows": None if session is None else getattr(session, "moo", session).windows,
            "weights": None if session is None else session.last.weights,
            "log": next(each for each in trainer.state.log_history if "loss" in each),
        }


if __name__ == "__main__":
    worker.serve(run)
