"""`"mode": "mixed"` under DeepSpeed: the engine reduces gradients as it always does, and they come weighted already.

Nothing private of DeepSpeed is read here, so that any version from 0.16 on will do: the engine gets its public methods
around those that it has, and its class stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from bucketmoo_ds.adapters import mixed
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.pipeline import checkpoint


def attach(engine: DeepSpeedEngine, config: BucketMOOConfig) -> None:
    """Makes an engine resolve the conflicts of micro-batches that mix languages.

    It then has `engine.moo`, the session; `engine.language(...)`; `engine.register_state`; and its checkpoints hold
    what a resumed run needs.

    Raises:
        ConfigError: the model, or what DeepSpeed is set to, does not allow it.
    """
    _refuse(engine)
    session = mixed.register(
        engine.module,
        config,
        micro_steps=engine.gradient_accumulation_steps,
        loss_scale=lambda: float(getattr(engine.optimizer, "loss_scale", 1.0)),
    )
    states: dict[str, checkpoint.Stateful] = {"moo": session}
    step, save, load = engine.step, engine.save_checkpoint, engine.load_checkpoint

    def step_and_end_window(*args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's `step`; where it is the optimizer's, it ends the window."""
        session.check_finished()
        taken = engine.global_steps
        result = step(*args, **kwargs)
        if engine.global_steps > taken:
            session.end_window()
        return result

    def save_with_ours(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's `save_checkpoint`, with `bucket_moo.json` in the same folder, which is written first.

        Raises:
            BucketMOOError: in the middle of a window, or (on every rank) where rank 0 could not write.
        """
        tag = str(tag) if tag is not None else f"global_step{engine.global_steps}"
        told = {name: owner.state_dict() for name, owner in states.items()}
        checkpoint.save(Path(save_dir) / tag, config, session.plan, told, session.exchange)
        return save(save_dir, tag, *args, **kwargs)

    def load_with_ours(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's `load_checkpoint`, and our state where the checkpoint has one.

        Raises:
            ConfigError: our state is of other languages, blocks or another mode, or lacks something registered.
        """
        path, client_state = load(load_dir, tag, *args, **kwargs)
        if path is not None:
            checkpoint.restore(path, config, states, session.exchange, universal=engine.load_universal_checkpoint())
        return path, client_state

    engine.moo = session
    engine.language = session.language
    engine.register_state = states.__setitem__
    engine.step, engine.save_checkpoint, engine.load_checkpoint = step_and_end_window, save_with_ours, load_with_ours


def _refuse(engine: DeepSpeedEngine) -> None:
    for what, is_on in (
        ("pipeline parallelism", isinstance(engine, PipelineEngine)),
        ("tensor, sequence or pipeline parallelism", engine.dp_world_size != dist.get_world_size()),
        ("DeepSpeed's mixture-of-experts layers", engine.has_moe_layers),
        ("gradient_allreduce_op = sum", not engine.gradient_average),
    ):
        if is_on:
            raise ConfigError(
                f'{SECTION}.mode = "mixed" cannot be combined with {what}: gradients must be the mean over all ranks, '
                "each of which has whole sequences of its own"
            )
