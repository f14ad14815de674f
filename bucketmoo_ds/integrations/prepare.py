"""`prepare`: a plain loop of Accelerate's, of which two lines change, the sampler's and this one's.

    model, optimizer, loader, moo = bm.prepare(accelerator, model, optimizer, loader, config=config)

Everything else stays as Accelerate's documentation has it: `accelerator.accumulate(model)`, `accelerator.backward`,
`save_state`, `load_state`. What a user would write by hand follows from what Accelerate has built.

Read in Accelerate 1.15 (`accelerator.py`, `state.py`).
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from bucketmoo_ds.adapters import mixed
from bucketmoo_ds.adapters.session import unwrapped
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.sampler import LanguageBatchSampler
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.integrations.wrapped import register, wrapper_of


def prepare(accelerator: Any, *objects: Any, config: BucketMOOConfig) -> tuple[Any, ...]:
    """`accelerator.prepare`, and the model resolves the conflicts of its languages.

    Without DeepSpeed the wrapped model is registered, with `accelerator.gradient_accumulation_steps` micro-steps, each
    of which is exchanged (`sync_each_batch`). Under DeepSpeed the settings become its JSON's section, and a batch size
    that is `"auto"` there is the sampler's.

    `accelerator.save_state` saves what a resumed run needs; `accelerator.load_state` restores it and moves the sampler
    to the first window that was not trained on, so that `skip_first_batches` is not needed.

    Args:
        accelerator: the `Accelerator`.
        objects: what its `prepare` takes: one model, and of loaders that of training alone. Its batch sampler is a
            `LanguageBatchSampler` without a rank; with `config.mode = "mixed"`, any.
        config: the settings.

    Returns:
        The prepared objects in their order and, last, the session; under DeepSpeed the engine's pipeline. Either has
        `last`, `windows` and `counters`.

    Raises:
        ConfigError: on every rank; the loader's batches are not of one language, or are others than Accelerate expects,
            or Accelerate has built another wrapper than it was asked for.
    """
    index = _only(objects, nn.Module, "model")
    loader = objects[_only(objects, DataLoader, "DataLoader: that of training; give others to accelerator.prepare")]
    sampler = None if config.mode == "mixed" else _sampler(loader, config)
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is not None:
        _write_json(plugin.deepspeed_config, loader, config, accelerator)
    _check_micro_steps(sampler, _micro_steps(accelerator, plugin))
    prepared = accelerator.prepare(*objects)
    model = prepared[index]
    session = model.moo if plugin is not None else _register(accelerator, model, config)
    if sampler is not None:
        sampler.follow(session)
    # DeepSpeed's own checkpoint, which save_state writes, holds the session's.
    accelerator.register_for_checkpointing(_Position(session, sampler, saves_session=plugin is None))
    return (*prepared, session)


class _Position:
    """The session and the sampler, as Accelerate saves them: `state_dict` is plain JSON values.

    Args:
        session: counts the windows.
        sampler: is moved to the window that comes; `None` where batches are another's.
        saves_session: whether nobody else does.
    """

    def __init__(self, session: Any, sampler: LanguageBatchSampler | None, saves_session: bool) -> None:
        self._session = session
        self._sampler = sampler
        self._saves_session = saves_session

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        state = {"session": self._session.state_dict()} if self._saves_session else {}
        if self._sampler is not None:
            epoch, window = divmod(self._session.windows, self._sampler.windows_per_epoch)
            state["sampler"] = self._sampler.state_dict(epoch=epoch, window=window)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        if self._saves_session:
            self._session.load_state_dict(state["session"])
        if self._sampler is not None:
            self._sampler.load_state_dict(state["sampler"])


def _only(objects: tuple[Any, ...], kind: type, expected: str) -> int:
    found = [index for index, each in enumerate(objects) if isinstance(each, kind)]
    if len(found) != 1:
        raise ConfigError(f"bm.prepare: {len(found)} objects of {kind.__name__}; expected one {expected}")
    return found[0]


def _sampler(loader: DataLoader[Any], config: BucketMOOConfig) -> LanguageBatchSampler:
    sampler = loader.batch_sampler
    if not isinstance(sampler, LanguageBatchSampler):
        raise ConfigError(
            f"bm.prepare: the loader's batches come from {type(sampler).__name__}, which mixes languages; make it with "
            "DataLoader(dataset, batch_sampler=bm.LanguageBatchSampler(dataset, config, micro_batch_size=..., "
            'micro_steps=accelerator.gradient_accumulation_steps)), or set mode = "mixed" and let them mix'
        )
    if sampler.languages != config.languages:
        raise ConfigError(
            f"bm.prepare: the sampler has languages = {list(sampler.languages)}, the config "
            f"{list(config.languages)}; give the sampler the same config"
        )
    return sampler


def _micro_steps(accelerator: Any, plugin: Any) -> int:
    """Those that Accelerate will take: its own, unless a DeepSpeed JSON says a number."""
    told = None if plugin is None else plugin.deepspeed_config.get("gradient_accumulation_steps", "auto")
    return int(accelerator.gradient_accumulation_steps if told in (None, "auto") else told)


def _check_micro_steps(sampler: LanguageBatchSampler | None, micro_steps: int) -> None:
    if sampler is not None and sampler.schedule.micro_steps != micro_steps:
        raise ConfigError(
            f"bm.prepare: gradient_accumulation_steps = {micro_steps}, but the sampler was made with micro_steps = "
            f"{sampler.schedule.micro_steps}; they are the same number"
        )


def _write_json(raw: dict[str, Any], loader: DataLoader[Any], config: BucketMOOConfig, accelerator: Any) -> None:
    """Puts the section into the DeepSpeed JSON, and the batch size where it says "auto": Accelerate asks the loader for
    it, which has none with a batch sampler."""
    section = config.to_json()
    if SECTION in raw and BucketMOOConfig(**raw[SECTION]) != config:
        raise ConfigError(
            f'bm.prepare: the DeepSpeed JSON has another "{SECTION}" than the config; leave it out of the JSON'
        )
    raw[SECTION] = section
    size = "train_micro_batch_size_per_gpu"
    batch = getattr(loader.batch_sampler, "batch_size", None)
    if raw.get(size) == "auto" and loader.batch_size is None and batch is not None:
        raw[size] = batch // accelerator.num_processes if accelerator.split_batches else batch


def _register(accelerator: Any, model: nn.Module, config: BucketMOOConfig) -> Any:
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and wrapper_of(model) not in ("fsdp1", "fsdp2"):
        raise ConfigError(
            f"bm.prepare: FSDP was asked for, and Accelerate has built {type(unwrapped(model)).__name__}, as it does "
            "on a CPU with cpu=True, and in one process; leave FSDP out, or see that it is used"
        )
    scaler = accelerator.scaler
    if config.mode == "mixed":
        scale = {} if scaler is None else {"loss_scale": scaler.get_scale}
        return mixed.register(model, config, micro_steps=lambda: accelerator.gradient_accumulation_steps, **scale)
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    return register(model, config, accelerator.gradient_accumulation_steps, scaler)
