"""Worker: transformers' Trainer with the loader of docs/guide.md, resumed from every checkpoint that is asked for."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import worker
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import bucketmoo_ds

LANGUAGES = ["de", "fr", "pl"]
ROWS = [{"row": torch.tensor(index), "language": (0, 0, 0, 0, 0, 1, 1, 2)[index % 8]} for index in range(48)]
MICRO_STEPS, EPOCHS = 2, 3


def run(*, steps: list[int], repeat: Any = 1, dispatch: bool = False, ignore_data_skip: bool = False) -> dict[str, Any]:
    """Returns the rows of this rank's micro-batches in the whole run, `fed`, those after resuming, by the step of the
    checkpoint, `resumed`, and the optimizer steps of an epoch, `windows`."""
    folder = [tempfile.mkdtemp() if worker.RANK == 0 else ""]
    dist.broadcast_object_list(folder)
    options = {"repeat": repeat, "dispatch": dispatch}
    whole, windows = train(folder[0], **options)
    resumed = {}
    for step in steps:
        with tempfile.TemporaryDirectory() as other:
            checkpoint = str(Path(folder[0], f"checkpoint-{step}"))
            resumed[step], _ = train(other, checkpoint=checkpoint, ignore_data_skip=ignore_data_skip, **options)
    dist.barrier()
    if worker.RANK == 0:
        shutil.rmtree(folder[0])
    return {"fed": whole, "resumed": resumed, "windows": windows}


class Model(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, row: Tensor, language: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight.sum() * row.float().mean()}


class LanguageTrainer(Trainer):
    """The guide's, which keeps the rows that it is fed."""

    repeat: Any
    fed: list[list[int]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        self.sampler = bucketmoo_ds.LanguageBatchSampler(
            self.train_dataset,
            languages=LANGUAGES,
            micro_batch_size=self.args.per_device_train_batch_size,
            micro_steps=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
            repeat=self.repeat,
        )
        loader = DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        self.fed.append(inputs["row"].tolist())
        return super().training_step(model, inputs, *rest)


def train(
    folder: str, repeat: Any, dispatch: bool, checkpoint: str | None = None, ignore_data_skip: bool = False
) -> tuple[list[list[int]], int]:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    trainer = LanguageTrainer(
        model=Model(),
        train_dataset=ROWS,
        args=TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=MICRO_STEPS,
            num_train_epochs=EPOCHS,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": dispatch},
            ignore_data_skip=ignore_data_skip,
            save_strategy="no" if checkpoint else "steps",
            save_steps=1,
            save_only_model=False,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.repeat, trainer.fed = repeat, []
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.fed, trainer.sampler.windows_per_epoch


if __name__ == "__main__":
    worker.serve(run)
