"""Worker: rank 1 fails inside DDP's communication hook in the second window, and nobody catches it."""

from __future__ import annotations

from typing import Any

import worker
from wrappers import Run


def fail(*_: Any) -> None:
    raise ValueError("the exchange failed on one rank")


worker.start()
run = Run("ddp")
run.window()
worker.leave("one window done")
if worker.RANK == 1:
    run.session.moo.exchange.scatter = fail  # type: ignore[method-assign]
run.window()
worker.leave("went on")
