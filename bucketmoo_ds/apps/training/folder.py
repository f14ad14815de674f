"""A run's folder belongs to one run at a time.

Every rank holds a shared lock on a file in it until its process ends, however it ends; a run begins by an exclusive
one, which it gets when no rank of another is left. The operating system keeps the locks, so that none outlives its
process: what stays behind is a file that names who held it last.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from typing_extensions import Self

from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.logs import logger

T = TypeVar("T")

FILE = ".lock"


def check_free(folder: Path) -> None:
    """Raises `ConfigError` where ranks of another run hold the folder; holds nothing itself."""
    if (folder / FILE).exists():
        FolderLock(folder).release()


def hold(folder: Path) -> FolderLock:
    """Takes the folder for all ranks of the default group, until each releases it or ends.

    Raises:
        ConfigError: on every rank, where another run holds it.
    """
    first = dist.get_rank() == 0
    # Rank 0 shares its lock before another rank asks for one: of two that do both at once, the other would be refused.
    taken = _together(lambda: FolderLock(folder).sign().share() if first else None)
    return _together(lambda: taken or FolderLock(folder, shared=True))


def _together(take: Callable[[], T]) -> T:
    """Calls `take` on every rank, and raises on all what one of them raised."""
    problem, taken = "", None
    try:
        taken = take()
    except ConfigError as error:
        problem = str(error)
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise ConfigError(next(filter(None, problems)))
    return cast(T, taken)


class FolderLock:
    """One process's lock on a folder, gone with the object's file.

    Args:
        shared: among the ranks of a run; otherwise nobody else may hold it.

    Raises:
        ConfigError: another run holds it; the message names its process and machine.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._file = self._path.open("a+", encoding="utf-8")
        self._lock("LOCK_SH" if shared else "LOCK_EX")

    def sign(self) -> Self:
        """Writes who holds it, for the message that others get."""
        self._file.truncate(0)
        self._file.write(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}))
        self._file.flush()
        return self

    def share(self) -> Self:
        """Lets the other ranks of this run hold it, too."""
        self._lock("LOCK_SH")
        return self

    def release(self) -> None:
        """Gives it up."""
        self._file.close()

    def _lock(self, kind: str) -> None:
        fcntl = _fcntl()
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, getattr(fcntl, kind) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                logger.warning("%s cannot be locked (%s): see to it that no two runs write there", self._path, error)
                return
            holder = self._holder()
            self._file.close()
            raise ConfigError(
                f"output = {str(self._path.parent)!r}: {holder} trains there; wait for it, end it, or name another "
                "folder"
            ) from error

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            found = json.loads(self._file.read())
            return f"process {found['process']} on {found['machine']}"
        except (ValueError, KeyError, TypeError):
            return "another run"


def _fcntl() -> Any:
    try:
        return importlib.import_module("fcntl")
    except ModuleNotFoundError:  # Windows
        return None
