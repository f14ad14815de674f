"""What every rank of a run does around its work: joins the others, and leaves without noise when something fails."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.integrations.termination import TERMINATED_STATUS

SETTINGS_STATUS = 2
INTERRUPTED_STATUS = 130

# A rank whose neighbour has died waits this long, in seconds, for the launcher to end it: so the launcher names the
# rank that failed first, and not one that lost its connection to it.
GRACE = 10.0
# The process that a rank must not outlive, where it cannot tell by itself; see `launch`.
PARENT = "BUCKETMOO_PARENT"
LOOK_EVERY = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

LOST_CONNECTION = ("Connection closed", "Connection reset", "Broken pipe", "Read error", "Write error")


class TerminatedError(Exception):
    """The ranks were asked to end, agreed on a step to do it at, and have said so."""


def run_rank(work: Callable[[], None], quiet: bool = False) -> None:
    """Runs `work` as one rank of a process group, and ends the process.

    A `BucketMOOError`, which all ranks raise alike, is told by rank 0 in one line. A rank that a launcher started ends
    with it, also where the launcher is killed and cannot end its ranks.

    Args:
        work: the rank's work.
        quiet: whether the lines that each engine logs at its start are left out.
    """
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED_STATUS))
    # Under Slurm, MPI or a shell, a rank may well outlive what started it.
    if PARENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(int(os.environ.get(PARENT, os.getppid())))
    prepare_rank(quiet)
    try:
        work()
    except TerminatedError:
        _leave(TERMINATED_STATUS)
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


def end_with(parent: int) -> None:
    """Ends this process when its parent has ended, at once on Linux and within a second elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        print(f"process {parent}, which started this rank, is gone", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


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
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # objects are gathered before an engine is made
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
