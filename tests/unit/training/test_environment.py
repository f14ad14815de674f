"""A rank does not outlive the process that started it."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from bucketmoo_ds.apps.training import environment


@pytest.mark.parametrize("way", ["prctl", "watch"])
def test_ranks_end_with_their_parent(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "prctl":
        monkeypatch.setattr(sys, "platform", "other")
        monkeypatch.setattr(environment, "LOOK_EVERY", 0.05)
    else:
        monkeypatch.setattr(environment, "LOOK_EVERY", 3600.0)
    reads, writes = os.pipe()
    parent = os.fork()
    if parent == 0:
        started = os.getpid()
        if os.fork() == 0:
            environment.end_with(started)
            os.write(writes, b"%7d" % os.getpid())
            signal.pause()
        os.close(writes)
        signal.pause()
    os.close(writes)
    rank = int(os.read(reads, 7))
    time.sleep(0.3)
    os.kill(rank, 0)  # it lives as long as its parent does
    os.kill(parent, signal.SIGKILL)
    began = time.monotonic()
    assert os.read(reads, 1) == b"", "the pipe closes with the rank"
    assert time.monotonic() - began < 20
    os.waitpid(parent, 0)
