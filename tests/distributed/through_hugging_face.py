"""Worker: the same training by `bucketmoo_ds.initialize`, by Accelerate and by transformers' Trainer.

A tiny Llama, trained with SGD for a few windows on batches of one language each, which `LanguageBatchSampler` draws.

Two traps of Accelerate 1.15 on the CPU: with `cpu=True` (Trainer: `use_cpu=True`) it builds DDP and drops the DeepSpeed
settings; without `backend="gloo"` every rank believes to be alone and takes all batches. Trainer passes no backend on
where it is given a DeepSpeed JSON, so its `PartialState` is made before it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import toy
import worker
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from deepspeed.runtime.engine import DeepSpeedEngine
from setup_engine import LANGUAGES, settings
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import bucketmoo_ds

SEED = 31
WINDOWS = 3
LEARNING_RATE = 0.1
SAMPLES = 40


def run(
    *, way: str, stage: int, micro_steps: int, moo: dict[str, Any] | None, ragged: bool, smoothing: float = 0.0
) -> dict[str, Any]:
    """Returns the parameters after `WINDOWS` windows and, where bucket_moo is on, how many windows it resolved."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=toy.VOCABULARY,
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=toy.LENGTH,
        )
    )
    config = settings(stage, micro_steps=micro_steps, moo=moo)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    ways: dict[str, Any] = {"initialize": initialize, "accelerate": accelerate, "trainer": train_with_trainer}
    engine = ways[way](model, config, Rows(ragged), smoothing)
    assert isinstance(engine, DeepSpeedEngine), f"{way} built {type(engine).__name__}"
    moo_engine = engine.moo if moo is not None else None
    return {
        "type": type(engine).__name__,
        "parameters": torch.cat([each.double().flatten() for each in worker.weights(engine.module)]),
        "windows": None if moo_engine is None else moo_engine.counters["windows"],
        "target_tokens": None if moo_engine is None else moo_engine.last.target_tokens,
        "weights": None if moo_engine is None else moo_engine.last.weights,
    }


class Rows(Dataset[dict[str, Any]]):
    """Samples of all languages; `ragged` ones have different numbers of targets."""

    def __init__(self, ragged: bool) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.rows = []
        for index in range(SAMPLES):
            language = index % len(LANGUAGES)
            batch = toy.micro_batch(language, generator, ragged=ragged)
            self.rows.append({"language": LANGUAGES[language]} | {name: value[0] for name, value in batch.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def sampler(self, config: dict[str, Any], rank: int | None) -> bucketmoo_ds.LanguageBatchSampler:
        return bucketmoo_ds.LanguageBatchSampler(
            self,
            languages=LANGUAGES,
            micro_batch_size=config["train_micro_batch_size_per_gpu"],
            micro_steps=config["gradient_accumulation_steps"],
            world_size=worker.WORLD_SIZE,
            rank=rank,
            affinity="window" if config["zero_optimization"]["stage"] == 1 else "micro_step",
            seed=SEED,
        )


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Keeps the languages of the rows, all of them, so that a mixed batch would be found."""
    tensors = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return tensors | {"language": [row["language"] for row in rows]}


def collate_without_language(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For plain DeepSpeed, which would pass the entry on to the model."""
    return {name: value for name, value in collate(rows).items() if name != "language"}


def collator(config: dict[str, Any]) -> Any:
    return collate if "bucket_moo" in config else collate_without_language


def initialize(model: Any, config: dict[str, Any], rows: Rows, smoothing: float) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = bucketmoo_ds.initialize(model=model, optimizer=optimizer, config=config)
    loader = DataLoader(rows, batch_sampler=rows.sampler(config, worker.RANK), collate_fn=collator(config))
    for batch in first_batches(loader, config):
        outputs = engine(**batch)
        engine.backward(smoothed(outputs.logits, batch["labels"], smoothing) if smoothing else outputs.loss)
        engine.step()
    return engine


def smoothed(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The mean over the target tokens, as models that shift their labels take it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)


def accelerate(model: Any, config: dict[str, Any], rows: Rows, smoothing: float) -> Any:
    """The loop of Accelerate's documentation."""
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(rows, batch_sampler=rows.sampler(config, None), collate_fn=collator(config))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in first_batches(loader, config):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return model


class SingleLanguageTrainer(Trainer):
    """A Trainer whose batches are drawn by `LanguageBatchSampler`."""

    settings: dict[str, Any]

    def get_train_dataloader(self) -> DataLoader[Any]:
        sampler = self.train_dataset.sampler(self.settings, None)
        loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def train_with_trainer(model: Any, config: dict[str, Any], rows: Rows, smoothing: float) -> Any:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SingleLanguageTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                deepspeed=config,
                accelerator_config={"use_configured_state": True},
                max_steps=WINDOWS,
                per_device_train_batch_size=config["train_micro_batch_size_per_gpu"],
                gradient_accumulation_steps=config["gradient_accumulation_steps"],
                optim="sgd",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                label_smoothing_factor=smoothing,
                remove_unused_columns=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=collator(config),
        )
        trainer.settings = config
        trainer.train()
        assert trainer.args.average_tokens_across_devices
        return trainer.model_wrapped


def first_batches(loader: Any, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for _, batch in zip(range(WINDOWS * config["gradient_accumulation_steps"]), loader, strict=False):
        yield batch


if __name__ == "__main__":
    worker.serve(run)
