"""Locks of torch's extension builds: old ones are named, and no others."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from bucketmoo_ds.adapters.deepspeed import extension_locks
from bucketmoo_ds.adapters.deepspeed.extension_locks import OLD, describe_old_locks, warn_of_old_locks
from bucketmoo_ds.apps.cli import doctor


def lock(path: Path, age: float) -> Path:
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize("default", [True, False], ids=["torch's folder", "TORCH_EXTENSIONS_DIR"])
def test_old_locks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, default: bool
) -> None:
    if default:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(extension_locks, "get_default_build_root", lambda: str(tmp_path))
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert describe_old_locks() == []
    assert doctor._extension_locks().well
    folder = tmp_path / "py311_cpu" if default else tmp_path
    old = lock(folder / "deepspeed_shm_comm" / "lock", OLD + 120)
    lock(folder / "fused_adam" / "lock", OLD - 120)
    (found,) = describe_old_locks()
    assert found.startswith(f"{old} is there for {(OLD + 120) / 60:.0f} minutes: ")
    assert found.endswith("remove the file")
    finding = doctor._extension_locks()
    assert (finding.well, finding.way_out) == (False, found)
    with caplog.at_level(logging.WARNING, "bucketmoo_ds"):
        monkeypatch.setenv("RANK", "1")
        warn_of_old_locks()
        assert caplog.messages == []
        monkeypatch.setenv("RANK", "0")
        warn_of_old_locks()
        assert caplog.messages == [found]
