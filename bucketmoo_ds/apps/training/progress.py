"""A progress bar with the loss of every language; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from typing_extensions import Self

# Seconds between two lines where there is no terminal to draw a bar on.
LINE_EVERY = 20.0


class Progress:
    """Shows how far a run is.

    Args:
        title: stands before the bar.
        total: steps.
        start: steps done before (a resumed run).
        shown: whether this rank shows anything.
    """

    def __init__(self, title: str, total: int, start: int, shown: bool) -> None:
        self._title = title
        self._total = total
        self._shown = shown
        self._console = Console(file=sys.stderr)
        self._bar: Bar | None = None
        self._start = start
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._shown and self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Bar(*columns, TextColumn("{task.fields[losses]}"), console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._start, losses="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, record: Mapping[str, Any]) -> None:
        """Shows a step record."""
        if not self._shown:
            return
        losses = " ".join(f"{name} {loss:.2f}" for name, loss in record["language_loss"].items())
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], losses=losses)
        elif time.monotonic() - self._last_line > LINE_EVERY or record["step"] == self._total:
            self._last_line = time.monotonic()
            print(f"{self._title} {record['step']}/{self._total}  {losses}", file=sys.stderr, flush=True)
