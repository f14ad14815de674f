"""What every rank of a run does around its work: joins the others, and leaves without noise when something fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from bucketmoo_ds.errors import BucketMOOError

SETTINGS_STATUS = 2
INTERRUPTED_STATUS = 130

# A rank whose neighbour has died waits this long, in seconds, for the launcher to end it: so the launcher names the
# rank that failed first, and not one that lost its connection to it.
GRACE = 10.0
LOST_CONNECTION = ("Connection closed", "Connection reset", "Broken pipe", "Read error", "Write error")


def run_rank(work: Callable[[], None], quiet: bool = False) -> None:
    """Runs `work` as one rank of a process group, and ends the process.

    A `BucketMOOError`, which all ranks raise alike, is told by rank 0 in one line.

    Args:
        work: the rank's work.
        quiet: whether the lines that each engine logs at its start are left out.
    """
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED_STATUS))
    prepare_rank(quiet)
    try:
        work()
    except BucketMOOError as error:
        if dist.get_rank() == 0:
            print(f"bucketmoo: {error}", file=sys.stderr, flush=True)
        _leave(SETTINGS_STATUS)
    except RuntimeError as error:
        if any(text in str(error) for text in LOST_CONNECTION):
            print(f"rank {dist.get_rank()} lost its connection to another rank", file=sys.stderr, flush=True)
            time.sleep(GRACE)
        else:
            traceback.print_exc()
        _leave(1)
    dist.barrier()
    dist.destroy_process_group()
    _leave(0)  # now and then, gloo's clean-up at the interpreter's end aborts a process whose work is done


def prepare_rank(quiet: bool) -> None:
    """Joins the process group, with DeepSpeed's messages turned down.

    On the CPU, DeepSpeed would first compile a shared-memory collective, for a minute, and fail without a compiler;
    gloo does without it. On an accelerator nothing changes.
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
    # DeepSpeed 0.19 calls functions of torch.distributed that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if quiet:
        logging.getLogger("bucketmoo_ds").setLevel(logging.WARNING)
    deepspeed.init_distributed()


def _leave(status: int) -> None:
    """Ends the process at once: other ranks may be gone, so that no clean-up can wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
