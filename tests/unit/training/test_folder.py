"""A run's folder: held by the ranks of one run, free again however they end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from unit.threaded_ranks import run_ranks

from bucketmoo_ds.apps.training import folder
from bucketmoo_ds.apps.training.folder import FILE, FolderLock, check_free
from bucketmoo_ds.errors import ConfigError


def test_one_run_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "made"
    first = FolderLock(run).sign()
    expected = f"output = '{run}': process {os.getpid()} on {socket.gethostname()} trains there; wait for it"
    for take in (lambda: FolderLock(run), lambda: FolderLock(run, shared=True), lambda: check_free(run)):
        with pytest.raises(ConfigError) as caught:
            take()
        assert str(caught.value).startswith(expected)
    second = FolderLock(run, shared=True) if first.share() else None
    first.release()
    with pytest.raises(ConfigError, match="trains there"):
        check_free(run)  # a rank is left
    assert second is not None
    second.release()
    check_free(run)
    FolderLock(run).release()


def test_ranks_hold_it_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first rank is slow to share its lock with the others."""
    share = FolderLock.share

    def late(lock: FolderLock) -> FolderLock:
        time.sleep(0.3)
        return share(lock)

    monkeypatch.setattr(FolderLock, "share", late)
    first, *others = run_ranks(3, lambda: folder.hold(tmp_path))
    first.release()
    for each in others:
        with pytest.raises(ConfigError, match="trains there"):
            check_free(tmp_path)
        each.release()
    check_free(tmp_path)
    other_run = FolderLock(tmp_path).sign()
    refused = run_ranks(3, lambda: folder.hold(tmp_path))
    assert all(isinstance(each, ConfigError) and "trains there" in str(each) for each in refused)
    other_run.release()


def test_a_folder_without_a_run_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    assert os.listdir(tmp_path) == []
    (tmp_path / FILE).write_text("not ours")
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match="another run trains there"):
        check_free(tmp_path)
    lock.release()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        lock = FolderLock(tmp_path).sign()
        os.write(writes, b"held")
        signal.pause()
        lock.release()
    assert os.read(reads, 4) == b"held"
    with pytest.raises(ConfigError, match=f"process {child} on "):
        check_free(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check_free(tmp_path)


def test_where_nothing_can_be_locked_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING, "bucketmoo_ds"):
        FolderLock(tmp_path).release()
    assert "No locks available" in caplog.text
    monkeypatch.setattr(folder, "_fcntl", lambda: None)  # Windows
    FolderLock(tmp_path, shared=True).release()
