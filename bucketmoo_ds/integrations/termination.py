"""SIGTERM, as a cluster sends it before it ends a job: kept until the end of a window, or told and obeyed at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from typing_extensions import Self

TERMINATED_STATUS = 128 + signal.SIGTERM


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
        self._before: Any = None
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if self._save:
            self._listen(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def say_what_is_lost(self, unsaved: Callable[[], str]) -> None:
        """Where nothing is saved, this process says `unsaved()` before it ends, unless somebody else listens already;
        call it on one rank, before the first step."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not self._save and in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._listen(lambda: _end(unsaved()))

    def tell_saved(self, step: int, go_on: str) -> None:
        """Says that the checkpoint of `step` is there, and how to go on; call it on one rank."""
        print(f"\nSIGTERM: saved a checkpoint of step {step}; go on with {go_on}", file=sys.stderr, flush=True)

    def _listen(self, heard: Callable[[], None]) -> None:
        self._before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        signal.signal(signal.SIGTERM, lambda number, frame: self._handle(heard))

    def _handle(self, heard: Callable[[], None]) -> None:
        if os.getpid() == self._process:
            heard()
        else:  # a fork of this rank, such as a worker of a pool, which is to end
            os._exit(TERMINATED_STATUS)

    def _note(self) -> None:
        self.asked = True


def unsaved(step: int, saved: int | None) -> str:
    """Says what is lost of a run that ends after `step`, where the latest checkpoint, if any, is of step `saved`."""
    if saved == step:
        return f"the latest checkpoint is of step {step}: no finished step is lost"
    since = "no checkpoint was saved" if saved is None else f"the latest is of step {saved}"
    return f"{step - (saved or 0)} finished steps are lost: {since}"


def _end(lost: str) -> None:
    # The signal may have come in the middle of a print, which a second one would break.
    os.write(sys.stderr.fileno(), f"\nSIGTERM: ended without saving; {lost}\n".encode())
    os._exit(TERMINATED_STATUS)
