"""`JsonLinesWriter`: one JSON object a line for every window, flushed at once, without duplicates after a resume.

The schema stands in `records`, the reader in `reader`. Only rank 0 opens a writer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from typing_extensions import Self

from bucketmoo_ds.apps.monitor.reader import read
from bucketmoo_ds.apps.monitor.records import DETAIL_KEYS, MetricsError, Record, StepRecord, check


class JsonLinesWriter:
    """Appends records to a metrics file.

    Steps 1, 1 + every, 1 + 2 * every, ... get a line, and so does every step that was skipped or had a row that was
    not finite. The seconds and tokens of a step without a line are added to the next line, so that sums stay right.

    Args:
        path: the file; its folder is made where it is missing.
        every: steps from one line to the next.
        detail_every: steps from one line with weights and cosines to the next; other lines lose that part.
        resume_from_step: the optimizer steps done in the checkpoint that training goes on from: later lines are
            dropped. 0 starts over. `None` is a new run, which refuses to write into a file that has lines already.

    Raises:
        ValueError: `every` or `detail_every` is not positive, or `resume_from_step` is negative.
        FileExistsError: a new run, but the file has lines.
        OSError: the file cannot be written; the message names it.
        MetricsError: the file to go on with holds something else than records.
    """

    def __init__(
        self, path: str | Path, every: int = 1, detail_every: int = 10, resume_from_step: int | None = None
    ) -> None:
        for name, value in (("every", every), ("detail_every", detail_every)):
            if value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        self.path = Path(path)
        self.every = every
        self.detail_every = detail_every
        self._held: StepRecord | None = None
        self._last_step = -1
        with _named_failure(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        if resume_from_step is not None:
            self.rewind(resume_from_step)
        elif os.fstat(self._file).st_size:
            self.close()
            raise FileExistsError(
                f"{self.path}: has lines already; write to another file, or go on with this one (resume_from_step)"
            )

    def wants(self, step: int) -> bool:
        """Whether `step` gets a line of its own anyway."""
        return step % self.every == 1 % self.every

    def wants_detail(self, step: int) -> bool:
        """Whether weights and cosines of `step` would be written, so that a caller need not gather them in vain."""
        return self.wants(step) and step % self.detail_every == 1 % self.detail_every

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record, flushed; a step record may be held back (see the class).

        Raises:
            MetricsError: the record is not of the schema, holds something that JSON cannot express, or is of a step
                that was written before (`rewind` first).
            OSError: the file cannot be written, for instance because the disk is full; the message names it.
        """
        checked = check(record)
        if checked["event"] != "step":
            self.flush()
            self._append(checked)
            return
        step = checked["step"]
        if step <= self._last_step:
            raise MetricsError(
                f"{self.path}: step {step} comes after step {self._last_step}; "
                f"after loading an older checkpoint call rewind({step - 1}) first"
            )
        self._last_step = step
        line = self._with_held(checked)
        self._held = line
        if self.wants(step) or line["skipped"] or line["nonfinite"]:
            self.flush()

    def flush(self) -> None:
        """Writes the step that is held back, if there is one. Call it when a checkpoint is saved."""
        held, self._held = self._held, None
        if held is not None:
            self._append(held)

    def rewind(self, step: int) -> None:
        """Drops every line after `step`, and the record of an end, because the run goes on from there.

        The file is replaced in one move: a crash leaves the old one or the new one.

        Raises:
            ValueError: `step` is negative.
            OSError, MetricsError: as for the class.
        """
        if step < 0:
            raise ValueError(f"resume_from_step = {step}: expected the optimizer steps done, at least 0")
        self.flush()
        kept = [
            record
            for record in itertools.takewhile(lambda record: _step(record) <= step, read(self.path))
            if record["event"] != "end"
        ]
        with _named_failure(self.path):
            self._replace(b"".join(self._line(record) for record in kept))
        self._last_step = max((_step(record) for record in kept if record["event"] == "step"), default=-1)

    def close(self) -> None:
        """Writes what is held back and closes the file; a second call does nothing."""
        if self._file < 0:
            return
        try:
            self.flush()
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _with_held(self, record: StepRecord) -> StepRecord:
        line = dict(record)
        if not self.wants_detail(record["step"]):
            line = {key: value for key, value in line.items() if key not in DETAIL_KEYS}
        if self._held is not None:
            tokens = dict(self._held["language_tokens"])
            for language, count in record["language_tokens"].items():
                tokens[language] = tokens.get(language, 0) + count
            line["seconds"] = self._held["seconds"] + record["seconds"]
            line["tokens"] = self._held["tokens"] + record["tokens"]
            line["language_tokens"] = tokens
        return cast(StepRecord, line)

    def _line(self, record: Record) -> bytes:
        try:
            return (json.dumps(_finite(record), allow_nan=False, separators=(",", ":")) + "\n").encode()
        except TypeError as error:
            raise MetricsError(f'{self.path}: a "{record["event"]}" record is no JSON: {error}') from error

    def _append(self, record: Record) -> None:
        line = self._line(record)
        if self._file < 0:
            raise ValueError(f"{self.path}: the writer is closed")
        start = os.fstat(self._file).st_size
        try:
            with _named_failure(self.path):
                _write_all(self._file, line)
        except OSError:
            # Half a line in the middle of the file would make it unreadable, should the caller go on.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, start)
            raise

    def _replace(self, content: bytes) -> None:
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        os.close(self._file)
        self._file = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


@contextlib.contextmanager
def _named_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot write the metrics ({error.strerror}); free the place or choose another metrics_file"
        raise OSError(error.errno, message, str(path)) from error


def _write_all(file: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(file, rest) :]


def _step(record: Record) -> int:
    return 0 if record["event"] == "run" else record["step"]


def _finite(value: Any) -> Any:
    """Copies a JSON value with `None` for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
