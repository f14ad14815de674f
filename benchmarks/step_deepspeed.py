"""The arms of the step benchmark: ZeRO, with bucket_moo and without."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from step_worker import Arm, Run, Settings

import bucketmoo_ds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSettings(Settings):
    """What all arms of a process set share.

    Args:
        stage: of ZeRO.
    """

    stage: int

    def run(self, arm: Arm, rank: int) -> Run:
        """See `Settings`."""
        return _ZeroRun(self, arm, rank)


class _ZeroRun(Run):
    """An engine of one arm."""

    def __init__(self, settings: ZeroSettings, arm: Arm, rank: int) -> None:
        super().__init__(settings, arm, rank)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.engine, *_ = bucketmoo_ds.initialize(
            model=self.model, optimizer=optimizer, config=_deepspeed_config(settings, arm)
        )
        self.moo = self.engine.moo if arm.aggregator is not None else None

    def window(self) -> None:
        """See `Run`."""
        for batch in self.batches:
            self.engine.backward(self.engine(**batch))
            self.engine.step()


def _deepspeed_config(settings: ZeroSettings, arm: Arm) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": arm.micro_steps,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.stage, "reduce_bucket_size": settings.bucket_elements},
        "steps_per_print": 10**9,
    }
    if settings.dtype != "fp32":
        config[settings.dtype] = {"enabled": True}
    if arm.aggregator is not None:
        config["bucket_moo"] = arm.config.to_json()
    return config
