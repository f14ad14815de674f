"""Reads `metrics.jsonl` back: `read` forgives a torn last line (a killed run) and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from bucketmoo_ds.apps.monitor.records import MetricsError, Record, check


def read(path: str | Path) -> list[Record]:
    """Returns the records of a metrics file in the order of its lines.

    A last line without its newline that is no complete JSON is what a killed run leaves, and is dropped.

    Raises:
        OSError: the file cannot be read.
        MetricsError: any other line that is not a record; the message names file and line.
    """
    *lines, tail = Path(path).read_bytes().split(b"\n")
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if tail and _is_json(tail):
        records.append(_record(tail, f"{path}, line {len(lines) + 1}"))
    return records


def _record(line: bytes, where: str) -> Record:
    try:
        value = json.loads(line, parse_constant=_refuse)
    except ValueError as error:
        raise MetricsError(f"{where}: not a JSON object ({error}); only a torn last line is forgiven") from error
    if not isinstance(value, dict):
        raise MetricsError(f"{where}: expected a JSON object, got {type(value).__name__}")
    try:
        return check(value)
    except MetricsError as error:
        raise MetricsError(f"{where}: {error}") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        MetricsError: it holds something else; the message names the file.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise MetricsError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise MetricsError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
