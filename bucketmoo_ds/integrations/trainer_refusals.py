"""What `LanguageTrainerMixin` cannot do: refused, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn.parallel import DataParallel

from bucketmoo_ds.adapters.session import unwrapped
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.integrations.wrapped import wrapper_of

_OF_TRL = {"SFTTrainer": ("placed", "mixed"), "DPOTrainer": ("placed",)}  # the modes that are right there
_LOADERS_OF = ("transformers", "trl", "swift")  # whose loaders `language_batches.placed_loader` stands in for


def mode_of(config: BucketMOOConfig, mode: str | None) -> str:
    """Returns the mode of the mixin, by its argument and the settings; raises `ConfigError` where they differ."""
    if mode not in (None, "placed", "mixed"):
        raise ConfigError(f'mode = "{mode}": expected "placed" or "mixed"')
    if mode == "placed" and config.mode == "mixed":
        raise ConfigError('mode = "placed", but bucket_moo.mode = "mixed": leave one of them out')
    return mode or ("mixed" if config.mode == "mixed" else "placed")


def refuse_trainer(behind: Sequence[type], mode: str) -> None:
    """Raises `ConfigError` where a class that the mixin is put before makes its loss in a way that is not known to be
    right, or its batches.

    Args:
        behind: it and its bases, in the order of resolution.
    """
    trl = next((each for each in behind if each.__module__.startswith("trl.")), None)
    if trl is not None and not trl.__name__.startswith("_") and mode not in (modes := _OF_TRL.get(trl.__name__, ())):
        reason = f'use mode="{modes[0]}"' if modes else f"it is for {', '.join(['Trainer, Seq2SeqTrainer', *_OF_TRL])}"
        raise ConfigError(
            f'LanguageTrainerMixin, mode "{mode}": how {trl.__name__} makes its loss of the rows of a batch is not '
            f"known to be right for a language; {reason}"
        )
    owner = next((each for each in behind if "get_train_dataloader" in vars(each)), None)
    if mode == "placed" and owner is not None and owner.__module__.partition(".")[0] not in _LOADERS_OF:
        raise ConfigError(
            f"{owner.__name__}.get_train_dataloader: LanguageTrainerMixin draws micro-batches of one language itself, "
            'and would not call it; leave it out, or take mode="mixed"'
        )


def refuse_data_parallel(trainer: Any) -> None:
    """Raises `ConfigError` where one process feeds several GPUs."""
    if isinstance(unwrapped(trainer.model_wrapped), DataParallel):
        raise ConfigError(
            "Trainer has wrapped the model in DataParallel, as one process sees several GPUs: start one process for "
            "each, torchrun --nproc_per_node, or let it see one, CUDA_VISIBLE_DEVICES=0"
        )


def refuse_again(trainer: Any, earlier: object) -> None:
    """Raises `ConfigError` where an earlier `train()` has left what no other can begin with."""
    model: Any = unwrapped(trainer.model_wrapped)
    if trainer.model_init is not None:  # which makes another
        return
    what = ""
    if trainer.is_deepspeed_enabled and model is not trainer.model:
        what = "Trainer destroys the DeepSpeed engine that it has, and makes no other"
    elif earlier is not None and wrapper_of(model) == "fsdp1":
        what = "FullyShardedDataParallel (fsdp_config version 1) keeps what was registered with it; use version 2"
    if what:
        raise ConfigError(
            f"train() again, or after an evaluation: {what}. Train for more steps at once (max_steps, "
            "num_train_epochs), or resume from a checkpoint in a new process"
        )


def refuse_apart(trainer: Any) -> None:
    """Raises `ConfigError` where nobody reduces the gradients of several ranks."""
    wrapped = trainer.is_deepspeed_enabled or wrapper_of(trainer.model_wrapped) != "single"
    if trainer.args.world_size > 1 and not wrapped:
        raise ConfigError(
            f"Trainer has wrapped the model in nothing ({type(unwrapped(trainer.model_wrapped)).__name__}), so that "
            f"{trainer.args.world_size} ranks would train apart from each other; make a new trainer of the model"
        )
