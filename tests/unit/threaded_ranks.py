"""Several ranks in one process, each a thread with a process group: the real `Exchange`, on more ranks than processes
are worth. What torch tests its own collectives with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

TIMEOUT_SECONDS = 20.0


def run_ranks(world_size: int, body: Callable[[], Any]) -> list[Any]:
    """Runs `body` once a rank; returns its results, or the exception it raised, rank by rank.

    Ranks that wait for one that has raised are ended, and have `None`.
    """
    results: list[Any] = [None] * world_size
    store = dist.HashStore()
    everyone = threading.Barrier(world_size, timeout=TIMEOUT_SECONDS)

    def one(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = body()
        except Exception as error:  # handed to the test, which says what it expects
            results[rank] = error
        try:
            everyone.wait()
        except threading.BrokenBarrierError as error:
            ProcessLocalGroup.exception_handle(error)
        else:
            dist.destroy_process_group()

    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
        ProcessLocalGroup.reset()
    return results
