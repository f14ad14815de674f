"""Worker: trains a few windows, saves, dies or goes on; loads, and goes on from there."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import toy
import worker
from setup_engine import LANGUAGES, make_engine, settings, train_window

import bucketmoo_ds
from bucketmoo_ds.errors import BucketMOOError

SAVE_AFTER, WINDOWS = 3, 6
SAMPLES = 20


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


class Run:
    """An engine, its sampler and its data: 20 samples of every language, the same in every process."""

    def __init__(
        self, *, seed: int, stage: int, micro_steps: int, dtype: str, offload: bool, moo: dict[str, Any]
    ) -> None:
        config = settings(
            stage, micro_steps=micro_steps, dtype=dtype, offload=offload, moo=moo, gradient_clipping=1.0
        )
        self.engine = make_engine(config, seed=seed, optimizer=torch.optim.AdamW)
        generator = torch.Generator().manual_seed(seed)
        self.rows = [
            {"language": name} | toy.micro_batch(index, generator, ragged=True)
            for index, name in enumerate(LANGUAGES)
            for _ in range(SAMPLES)
        ]
        self.sampler = bucketmoo_ds.LanguageBatchSampler(
            sample_languages=[row["language"] for row in self.rows],
            languages=LANGUAGES,
            micro_batch_size=1,
            micro_steps=micro_steps,
            rank=worker.RANK,
            world_size=worker.WORLD_SIZE,
            affinity="window" if stage == 1 else "micro_step",
            seed=seed,
        )
        self.engine.register_state("sampler", self.sampler)
        self.losses: list[float] = []

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            for (row,) in self.sampler:
                yield self.rows[row]

    def train(self, windows: int, batches: Iterator[dict[str, Any]]) -> None:
        for _ in range(windows * self.engine.gradient_accumulation_steps()):
            loss = self.engine(**next(batches))
            self.engine.backward(loss)
            self.engine.step()
            self.losses.append(float(loss))

    def state(self) -> dict[str, Any]:
        moo = self.engine.moo
        return {
            "bits": worker.checksum(
                [*worker.weights(self.engine.module), *worker.optimizer_state(self.engine.optimizer)]
            ),
            "losses": self.losses,
            "windows": moo.windows,
            "counters": dict(moo.counters),
            "sampler": self.sampler.state_dict(),
        }


def uninterrupted(folder: str, **case: Any) -> dict[str, Any]:
    run = Run(**case)
    run.train(WINDOWS, run.batches())
    return run.state()


def save(folder: str, **case: Any) -> dict[str, Any]:
    run = Run(**case)
    run.train(SAVE_AFTER, run.batches())
    run.engine.save_checkpoint(folder)
    return run.state()


def die_in_a_window() -> None:
    """The first of two micro-steps, and then the end, on all ranks."""
    engine = make_engine(settings(2, micro_steps=2, moo={}), seed=1)
    batch = toy.micro_batch(worker.RANK, torch.Generator().manual_seed(worker.RANK))
    engine.backward(engine(**batch, language=worker.RANK))
    os.kill(os.getpid(), signal.SIGKILL)


def resume(folder: str, **case: Any) -> dict[str, Any]:
    run = Run(**case)
    path, _ = run.engine.load_checkpoint(folder)
    assert path is not None
    run.train(WINDOWS - SAVE_AFTER, run.batches())
    return run.state()


def resume_with_other(folder: str, moo: dict[str, Any], bucket_size: int = 1500) -> None:
    config = settings(2, micro_steps=2, moo=moo)
    config["zero_optimization"]["reduce_bucket_size"] = bucket_size
    engine = make_engine(config, seed=1, optimizer=torch.optim.AdamW)
    engine.load_checkpoint(folder)


def save_in_a_window(folder: str, stage: int) -> None:
    engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=1)
    batch = toy.micro_batch(worker.RANK, torch.Generator().manual_seed(worker.RANK))
    engine.backward(engine(**batch, language=worker.RANK))
    engine.step()
    engine.save_checkpoint(folder)


def disk_full(folder: str) -> dict[str, Any]:
    """The folder of the second checkpoint is a file on rank 0, so that ours cannot be written."""
    engine = make_engine(settings(2, moo={}), seed=1)
    generator = torch.Generator().manual_seed(worker.RANK)
    train_window(engine, generator)
    engine.save_checkpoint(folder, tag="first")
    saved = worker.checksum(worker.weights(engine.module))
    train_window(engine, generator, window=1)
    if worker.RANK == 0:
        (Path(folder) / "second").write_text("in the way")
    torch.distributed.barrier()
    try:
        engine.save_checkpoint(folder, tag="second")
    except BucketMOOError as error:
        message = str(error)
    path, _ = engine.load_checkpoint(folder)
    return {
        "message": message,
        "path": Path(path).parent.name,
        "bits": worker.checksum(worker.weights(engine.module)) == saved,
        "windows": engine.moo.windows,
    }


def disk_fills(folder: str, stage: int, rank: int) -> dict[str, Any]:
    """While DeepSpeed writes the second checkpoint, on one rank: half of a file is there, then there is no space."""
    engine = make_engine(settings(stage, moo={}), seed=1)
    generator = torch.Generator().manual_seed(worker.RANK)
    train_window(engine, generator)
    engine.save_checkpoint(folder, tag="first")
    saved = worker.checksum(worker.weights(engine.module))
    train_window(engine, generator, window=1)
    write = torch.save
    if rank == worker.RANK:
        torch.save = _fill_disk
    try:
        engine.save_checkpoint(folder, tag="second")
    except BucketMOOError as error:
        message = str(error)
    torch.save = write
    path, _ = engine.load_checkpoint(folder)
    loaded = {"path": Path(path).parent.name, "bits": worker.checksum(worker.weights(engine.module)) == saved}
    train_window(engine, generator, window=1)
    engine.save_checkpoint(folder, tag="second")
    return {"message": message, "latest": (Path(folder) / "latest").read_text()} | loaded


def _fill_disk(content: Any, path: str, **options: Any) -> None:
    Path(path).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def plain_checkpoint(folder: str) -> dict[str, Any]:
    """DeepSpeed's own checkpoint, of a run without bucket_moo."""
    plain = make_engine(settings(2), seed=1)
    plain.backward(plain(**toy.micro_batch(0, torch.Generator().manual_seed(worker.RANK))))
    plain.step()
    plain.save_checkpoint(folder)
    engine = make_engine(settings(2, moo={}), seed=2)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bucketmoo_ds").addHandler(handler)
    engine.load_checkpoint(folder)
    logging.getLogger("bucketmoo_ds").removeHandler(handler)
    same = worker.checksum(worker.weights(engine.module)) == worker.checksum(worker.weights(plain.module))
    train_window(engine, torch.Generator().manual_seed(worker.RANK))
    return {"same": same, "messages": messages, "windows": engine.moo.windows}


def save_16bit(folder: str) -> dict[str, Any]:
    config = settings(3, dtype="bf16", moo={})
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = make_engine(config, seed=1)
    train_window(engine, torch.Generator().manual_seed(worker.RANK))
    saved = engine.save_16bit_model(folder, "model.pt")
    weights = worker.weights(engine.module)
    if worker.RANK != 0:
        return {"saved": saved}
    found = torch.load(Path(folder) / "model.pt", weights_only=True)
    names = [name for name, _ in engine.module.named_parameters()]
    return {
        "saved": saved,
        "same": all(found[name].equal(each) for name, each in zip(names, weights, strict=True)),
        "dtypes": sorted({str(each.dtype) for each in found.values()}),
    }


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        uninterrupted,
        save,
        die_in_a_window,
        resume,
        resume_with_other,
        save_in_a_window,
        disk_full,
        disk_fills,
        plain_checkpoint,
        save_16bit,
    )
}

if __name__ == "__main__":
    worker.serve(run)
