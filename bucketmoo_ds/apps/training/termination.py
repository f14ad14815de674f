"""SIGTERM, as a cluster sends it before it ends a job: kept until the end of a window, or told and obeyed at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

import torch.distributed as dist
from typing_extensions import Self

from bucketmoo_ds.apps.training.environment import TERMINATED_STATUS, TerminatedError


class TerminationRequest:
    """Listens for SIGTERM within a `with` block, which begins before the ranks first wait for each other: so none is
    ended by a signal that another keeps.

    Args:
        save: whether the run saves before it ends, at the end of a window. Which one, the ranks have to agree on: a
            launcher's signal reaches them at different moments, or only one of them.

    Attributes:
        asked: whether this rank was asked to end.
    """

    def __init__(self, save: bool) -> None:
        self.asked = False
        self._save = save

    def __enter__(self) -> Self:
        if self._save:
            signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def say_what_is_lost(self, unsaved: Callable[[], str]) -> None:
        """Where nothing is saved, rank 0 says `unsaved()` before it ends; call it before the first step."""
        if not self._save and dist.get_rank() == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: _end(unsaved()))

    def leave(self, step: int) -> None:
        """Ends the run after its checkpoint of `step`, on all ranks; raises `TerminatedError`."""
        if dist.get_rank() == 0:
            print(f"\nSIGTERM: saved a checkpoint of step {step}; go on with --resume", file=sys.stderr, flush=True)
        raise TerminatedError

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _end(lost: str) -> None:
    # The signal may have come in the middle of a print, which a second one would break.
    os.write(sys.stderr.fileno(), f"\nSIGTERM: ended without saving; {lost}\n".encode())
    os._exit(TERMINATED_STATUS)
