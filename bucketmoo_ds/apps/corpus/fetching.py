"""What the downloaded corpora share: run a package manager under a time limit, and unpack into a cache in one step."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class CorpusUnavailable(RuntimeError):  # noqa: N818 - says what is the matter, not that something is
    """A corpus could not be fetched here; the message says why and what to do."""


def fetch_once(target: Path, fetch: Callable[[Path], None]) -> Path:
    """Fill `target` by calling `fetch` with an empty folder beside it, unless `target` is there already.

    The folder takes its final name only when `fetch` has returned, so an interrupted run leaves no half a corpus, and
    of several processes that fetch at once the first to finish wins.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        unpacked = Path(scratch, "unpacked")
        unpacked.mkdir()
        fetch(unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def require_programs(*programs: str) -> None:
    """Raise CorpusUnavailable for the first program that is not on the path."""
    for program in programs:
        if shutil.which(program) is None:
            raise CorpusUnavailable(f"{program} is not installed here")


def run_command(
    name: str, command: Sequence[str], timeout: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a command, return its standard output.

    Args:
        name: what to call it in errors, e.g. `"apt-get update"`.
        command: program and arguments.
        timeout: seconds after which the program and all it started are killed.
        cwd: working folder.
        env: variables on top of this process's own.

    Raises:
        CorpusUnavailable: the program cannot be started, fails, or takes longer than `timeout`.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # apt and pip start helpers; a group of their own lets a timeout end them together.
            start_new_session=True,
        )
    except OSError as error:
        raise CorpusUnavailable(f"`{name}` could not be started: {error}") from error
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise CorpusUnavailable(f"`{name}` took longer than {timeout:.0f} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        reason = "\n".join((errors.strip() or output.strip()).splitlines()[-5:])
        raise CorpusUnavailable(f"`{name}` failed with exit status {process.returncode}: {reason}")
    return output
