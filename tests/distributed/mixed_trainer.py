"""Worker: transformers' Trainer with languages, mixed in every batch or not, under DDP, FSDP and DeepSpeed.

On a CPU Accelerate shards nothing: here its state is told that it does, and all else of Trainer's FSDP runs as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import toy
import worker
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from setup_engine import LANGUAGES, settings
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import bucketmoo_ds
from bucketmoo_ds.errors import ConfigError

WINDOWS = 3
MICRO_STEPS = 2
LONGER = 7  # into the second epoch


class Languages(bucketmoo_ds.LanguageTrainerMixin, Trainer):
    """What a user writes."""


class Sharded(Languages):
    """The same where Accelerate shards."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        for state in (AcceleratorState, PartialState):  # FSDP1 takes no "cpu:0"
            state._shared_state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
        self.is_fsdp_enabled = True


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

    def __init__(self, seed: int, languages: int = len(LANGUAGES)) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for language in torch.randint(languages, (40,), generator=generator).tolist():
            batch = toy.micro_batch(language, generator, ragged=True)
            self.rows.append({"language": LANGUAGES[language]} | {name: value[0] for name, value in batch.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def run(
    *, wrapper: str, moo: dict[str, Any] | None, seed: int, mode: str = "mixed", **more: Any
) -> dict[str, Any]:
    """Trains `WINDOWS` windows and as many again, after evaluations and with one at the end.

    Args:
        wrapper: what Trainer is to build.
        moo: the settings; `None` for plain Trainer.
        mode: of the mixin.
        more: see `trainer_of`.

    Returns:
        parameters, what was decided last, and what was logged, of both runs; and the losses by language in the end.
    """
    with shared_folder() as folder:
        trainer = trainer_of(wrapper=wrapper, moo=moo, seed=seed, mode=mode, folder=folder, number=seed, **more)
        held_out = Rows(seed + 1, more.get("languages", len(LANGUAGES)))
        if wrapper == "ddp" and moo:  # plain Trainer would train its ranks apart then
            trainer.evaluate(held_out)
        trainer.train()
        found = described(trainer)
        try:
            trainer.train()
            found["again"] = described(trainer)
        except ConfigError as error:
            found["again"] = str(error)
        found["evaluated"] = {name: loss for name, loss in trainer.evaluate(held_out).items() if name.count("_") == 2}
    return found


def resumed(*, wrapper: str, seed: int, **more: Any) -> dict[str, Any]:
    """Returns what comes of `LONGER` windows, and of another model that goes on from the checkpoint before the last."""
    settings = {"max_steps": LONGER, "optim": "adamw_torch", "learning_rate": 0.01}
    with shared_folder() as folder:
        told = {"wrapper": wrapper, "seed": seed, "folder": folder, **more, **settings}
        trainer = trainer_of(number=seed, save_strategy="steps", save_steps=LONGER - 1, **told)
        trainer.train()
        other = trainer_of(number=seed + 1, **told)
        other.train(resume_from_checkpoint=f"{folder}/checkpoint-{LONGER - 1}")
    return described(trainer) | {"resumed": described(other), "epoch": trainer.state.epoch}


def ended(*, wrapper: str, seed: int, by: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Returns what comes of `WINDOWS` windows, of a run that `Ended` has made save, and of another model that goes on
    from there."""
    with shared_folder() as folder:
        told = {"wrapper": wrapper, "seed": seed, "folder": folder, **more}
        whole = trainer_of(number=seed, **told)
        whole.train()
        trainer = trainer_of(number=seed, enable_jit_checkpoint=True, **told)
        trainer.add_callback(Ended(**by))
        trainer.train()
        found = {"step": trainer.state.global_step, "listens": signal.getsignal(signal.SIGTERM) != signal.SIG_DFL}
        torch.distributed.barrier()
        found["saved"] = os.listdir(folder)
        other = trainer_of(number=seed + 1, **told)
        other.train(resume_from_checkpoint=True)
    return found | described(whole) | {"resumed": described(other)}


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    place = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(place)
    yield place[0]
    torch.distributed.barrier()
    shutil.rmtree(place[0], ignore_errors=True)


def described(trainer: Any) -> dict[str, Any]:
    session, model = trainer.moo, trainer.model
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            parameters = worker.weights(model)
    else:
        parameters = [getattr(each, "full_tensor", lambda each=each: each)() for each in worker.weights(model)]
    return {
        "type": type(trainer.model_wrapped).__name__,
        "parameters": torch.cat([each.double().flatten() for each in parameters]),
        "windows": None if session is None else session.windows,
        "affinity": affinity(trainer),
        "weights": None if session is None else session.last.weights,
        "hooks": hooks(trainer.model),
        "log": next((each for each in trainer.state.log_history if "loss" in each), None),
    }


def hooks(model: torch.nn.Module) -> int:
    """How many are left when a run is over."""
    own = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
    return own + len(_global_optimizer_pre_hooks)


def affinity(trainer: Any) -> str | None:
    """What the sampler of the latest run took."""
    sampler = trainer.callback_handler.train_dataloader.batch_sampler
    sampler = getattr(sampler, "batch_sampler", sampler)
    return sampler.schedule.affinity if hasattr(sampler, "schedule") else None


def trainer_of(
    *,
    wrapper: str,
    moo: dict[str, Any] | None,
    seed: int,
    mode: str,
    folder: str,
    number: int,
    languages: int = len(LANGUAGES),
    sampler: dict[str, Any] | None = None,
    sharded: bool = False,
    **more: Any,
) -> Languages:
    """Returns the trainer of model `number`, and of the data of a seed.

    Args:
        languages: how many.
        sampler: further arguments of the mixin's.
        sharded: whether FSDP writes each rank's own part into checkpoints.
    """
    torch.manual_seed(number)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=toy.VOCABULARY, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2
        )
    )
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    level = int(wrapper[-1]) if wrapper != "ddp" else 2
    zero = settings(level, micro_steps=MICRO_STEPS, moo=None)
    config = zero | {"gradient_clipping": 0.0} if wrapper.startswith("zero") else None  # left out, it is 1
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": str(config is not None).lower(), "ACCELERATE_USE_FSDP": "false"}
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
        "accelerator_config": {"use_configured_state": True},
    }
    if wrapper.startswith("fsdp"):
        saved = "SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT"
        how = {"version": level, "state_dict_type": saved, "sync_module_states": False}  # which asks for a device
        usual |= {"fsdp": True, "fsdp_config": how}
    return (Sharded if "fsdp" in usual else Languages)(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            deepspeed=config,
            use_cpu=config is None,
            per_device_train_batch_size=zero["train_micro_batch_size_per_gpu"],
            gradient_accumulation_steps=MICRO_STEPS,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            **{**usual, **more},
        ),
        train_dataset=Rows(seed, languages),
        data_collator=collate,
        moo=None if moo is None else bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES[:languages], gram_every=1, **moo),
        mode=mode,
        sampler=sampler,
    )


def case(*, what: str = "run", **more: Any) -> dict[str, Any]:
    return {"run": run, "resumed": resumed, "ended": ended}[what](**more)


if __name__ == "__main__":
    worker.serve(case)
