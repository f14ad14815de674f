"""Worker: one rank dies in the middle of FSDP2's backward; the others must not wait for it for ever."""

from __future__ import annotations

import os
from typing import Any

import worker
from wrappers import Run

DYING = 1


def dying(scatter: Any, left: list[int]) -> Any:
    def scatter_or_die(flat: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os._exit(3)
        return scatter(flat)

    return scatter_or_die


if __name__ == "__main__":
    worker.start()
    (two_stages,) = worker.arguments()
    nodes: dict[str, Any] = {"exchange": "two_stage", "ranks_per_node": 2, "languages": ["de"]} if two_stages else {}
    run = Run("fsdp2", moo=nodes)
    if two_stages:
        run.micro_step = lambda window, step: run.loss(0, window).backward()  # type: ignore[method-assign]
    run.window()
    worker.leave("one window done")
    if worker.RANK == DYING:
        exchange: Any = run.session.moo.exchange
        name = "scatter_by_node" if two_stages else "scatter"
        setattr(exchange, name, dying(getattr(exchange, name), left=[1]))
    try:
        run.window(1)
    except RuntimeError as error:
        worker.leave(f"{type(error).__name__}: {error}")
        os._exit(1)
    worker.leave("went on without a rank")
