"""Our part of a checkpoint: one JSON file, so that loading it can run no code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.logs import logger
from bucketmoo_ds.plan.blocks import BlockPlan

FILE = "bucket_moo.json"
LATEST = "latest"
FORMAT = 1


class Stateful(Protocol):
    """Something whose state is plain JSON values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save(
    folder: Path, config: BucketMOOConfig, plan: BlockPlan, states: dict[str, dict[str, Any]], exchange: Exchange
) -> None:
    """Writes the file on rank 0, whole or not at all.

    Raises:
        BucketMOOError: on every rank, where rank 0 could not write.
    """
    problem = ""
    if exchange.rank == 0:
        content = {"format": FORMAT, SECTION: config.to_json(), "plan": plan.to_json(), "states": states}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / FILE, json.dumps(content, indent=1, allow_nan=False))
        except OSError as error:
            problem = f"{folder / FILE}: {error.strerror or error}"
        except (TypeError, ValueError) as error:
            problem = f"{folder / FILE}: a state is not plain JSON values ({error})"
    check_saved(problem, exchange)


def check_saved(problem: str, exchange: Exchange) -> None:
    """Compares what the ranks could not write.

    Args:
        problem: of this rank; empty for none.

    Raises:
        BucketMOOError: on every rank, where one of them had a problem.
    """
    found = [f"rank {rank}: {text}" for rank, text in enumerate(exchange.gather_text(problem)) if text]
    if found:
        raise BucketMOOError(f"the checkpoint was not saved: {'; '.join(found)}")


def name_latest(folder: Path, tag: str, exchange: Exchange) -> None:
    """Makes `tag` the checkpoint that DeepSpeed's `load_checkpoint` takes, on rank 0, when all ranks have written it.

    Raises:
        BucketMOOError: on every rank, where rank 0 could not write.
    """
    problem = ""
    if exchange.rank == 0:
        try:
            write_atomically(folder / LATEST, tag)
        except OSError as error:
            problem = f"{folder / LATEST}: {error.strerror or error}"
    check_saved(problem, exchange)


def load(folder: Path, config: BucketMOOConfig, *, universal: bool = False) -> dict[str, dict[str, Any]] | None:
    """Returns the states of a checkpoint, or `None` (with a warning) for one of a run without bucket_moo.

    Args:
        universal: whether DeepSpeed's converter has made the folder, which leaves our file behind.

    Raises:
        ConfigError: the file is damaged, of another format, or of other languages; or a universal checkpoint has none.
    """
    path = folder / FILE
    if universal and not path.exists():
        raise ConfigError(
            f"{folder} has no {FILE}, which ds_to_universal.py leaves behind: copy it there from the checkpoint that "
            "was converted"
        )
    if not path.exists():
        logger.warning("%s has no %s: a checkpoint of a run without bucket_moo; windows count from 0", folder, FILE)
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        if found == FORMAT:
            languages, states = content[SECTION]["languages"], dict(content["states"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged, or not written by bucketmoo_ds ({error!r})") from error
    if found != FORMAT:
        raise ConfigError(f"{path}: format {found}, expected {FORMAT}; load it with the version that wrote it")
    if languages != list(config.languages):
        raise ConfigError(
            f"{path}: saved with {SECTION}.languages = {languages}, here {list(config.languages)}; a resumed run "
            "needs the same languages in the same order"
        )
    return states


def restore(
    path: str, config: BucketMOOConfig, owners: dict[str, Stateful], exchange: Exchange, *, universal: bool
) -> None:
    """Gives the owners the states of the checkpoint that `path`, of the framework's own part, lies in; nothing where it
    has none.

    From a universal checkpoint, which may be of another world size, only the pipeline's own state, "moo", is restored:
    a sampler's position is one among other ranks.

    Raises:
        ConfigError: see `load`; or an owner has no state there.
    """
    states = load(Path(path).parent, config, universal=universal)
    if states is None:
        return
    left_out = sorted(owners.keys() - {"moo"}) if universal else []
    for name, owner in owners.items():
        if name in left_out:
            continue
        if name not in states:
            raise ConfigError(f'{path}: the checkpoint has no state "{name}" (it has {", ".join(states)})')
        owner.load_state_dict(states[name])
    if left_out and exchange.rank == 0:
        logger.warning("%s: %s not restored from a universal checkpoint", path, ", ".join(left_out))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by its new content, durably: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
