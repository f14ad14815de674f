"""Nothing waits for the device before a window is finished: the tests proper are in without_a_wait.py, and run in a
process of their own, for torch is told there of a device that counts, and cannot be told to forget it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("without_a_wait.py")


def test_on_a_device_that_counts() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(command, cwd=TESTS.parents[2], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout), done.stdout
