"""What every rank of a run does first."""

from __future__ import annotations

import os

import torch


def prepare_rank() -> None:
    """Joins the process group, with DeepSpeed's messages turned down.

    On the CPU, DeepSpeed would first compile a shared-memory collective, for a minute, and fail without a compiler;
    gloo does without it. Where it has been compiled before, or on an accelerator, nothing changes.
    """
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import deepspeed
    from deepspeed.utils import logger

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logger.setLevel("WARNING")
    deepspeed.init_distributed()


