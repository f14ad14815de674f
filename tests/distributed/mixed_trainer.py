"""Worker: transformers' Trainer with languages, mixed in every batch or not, under DDP and DeepSpeed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from typing import Any

import torch
import toy
import worker
from accelerate.state import AcceleratorState, GradientState, PartialState
from setup_engine import LANGUAGES, settings
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import bucketmoo_ds

WINDOWS = 3
MICRO_STEPS = 2
LONGER = 7  # into the second epoch


class Languages(bucketmoo_ds.LanguageTrainerMixin, Trainer):
    """What a user writes."""


class Ended(TrainerCallback):
    """Sends SIGTERM to one rank, at an event of a window."""

    def __init__(self, rank: int, window: int, event: str) -> None:
        self.when = window if rank == torch.distributed.get_rank() else None
        setattr(self, event, self.tell)

    def tell(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.when:
            os.kill(os.getpid(), signal.SIGTERM)


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


def run(
    *,
    stage: int | None,
    moo: dict[str, Any] | None,
    seed: int,
    mode: str = "mixed",
    resumed: bool = False,
    ended: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the parameters after `WINDOWS` windows under DDP, or a stage of ZeRO, and what was logged; resumed, after
    `LONGER`, and those of another model that went on from the checkpoint before the last window; ended, of a third one
    that went on from the checkpoint that `Ended` made the second write."""
    place = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(place)
    saves = {"save_strategy": "steps", "save_steps": LONGER - 1, "max_steps": LONGER} if resumed else {}
    trainer = trainer_of(stage, moo, seed, mode, place[0], seed, **saves)
    trainer.train()
    found = described(trainer)
    if resumed:
        again = trainer_of(stage, moo, seed, mode, place[0], seed + 1, max_steps=LONGER)
        again.train(resume_from_checkpoint=f"{place[0]}/checkpoint-{LONGER - 1}")
        found |= {"again": described(again), "epoch": trainer.state.epoch}
    if ended is not None:
        trainer = trainer_of(stage, moo, seed, mode, place[0], seed, max_steps=WINDOWS, enable_jit_checkpoint=True)
        trainer.add_callback(Ended(**ended))
        trainer.train()
        found |= {"step": trainer.state.global_step, "listens": signal.getsignal(signal.SIGTERM) != signal.SIG_DFL}
        torch.distributed.barrier()
        found["saved"] = os.listdir(place[0])
        again = trainer_of(stage, moo, seed, mode, place[0], seed + 1)
        again.train(resume_from_checkpoint=True)
        found["again"] = described(again)
    torch.distributed.barrier()
    shutil.rmtree(place[0], ignore_errors=True)
    return found


def described(trainer: Any) -> dict[str, Any]:
    session = trainer.moo
    return {
        "type": type(trainer.model_wrapped).__name__,
        "parameters": torch.cat([each.double().flatten() for each in worker.weights(trainer.model)]),
        "windows": None if session is None else session.windows,
        "weights": None if session is None else session.last.weights,
        "log": next((each for each in trainer.state.log_history if "loss" in each), None),
    }


def trainer_of(
    stage: int | None, moo: dict[str, Any] | None, seed: int, mode: str, folder: str, number: int, **more: Any
) -> Languages:
    """Returns the trainer of model `number`, and of the data of a seed."""
    torch.manual_seed(number)
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
    usual = {
        "max_steps": WINDOWS,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": WINDOWS,
    }
    return Languages(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            deepspeed=config,
            use_cpu=config is None,
            accelerator_config={"use_configured_state": True},
            per_device_train_batch_size=zero["train_micro_batch_size_per_gpu"],
            gradient_accumulation_steps=MICRO_STEPS,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            **{**usual, **more},
        ),
        train_dataset=Rows(seed),
        data_collator=collate,
        moo=None if moo is None else bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, gram_every=1, **moo),
        mode=mode,
    )


if __name__ == "__main__":
    worker.serve(run)
