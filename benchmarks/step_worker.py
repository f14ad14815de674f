"""One rank of a step benchmark: the arms, and how time, memory and bytes are measured.

All arms of a process set live side by side and take turns, so that whatever else the machine does hits all alike.
Memory is the exception: `measure_memory` runs one arm in processes of its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import traffic
from step_model import VOCABULARY, CausalLM

from bucketmoo_ds import BucketMOOConfig
from bucketmoo_ds.apps.training.environment import prepare_rank
from bucketmoo_ds.pipeline.engine import BucketMOO

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h: blocks of at least this many bytes go back to the system when freed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms of a process set share.

    Args:
        dtype: `fp32` or `bf16`.
        parameters: of the model, about; whole layers are added until they are reached.
        bucket_elements: of a bucket, where the framework lets one choose.
        tokens: of a micro-batch, one sequence.
        steps: timed windows of every arm.
        threads: of every rank.
    """

    world_size: int
    dtype: str
    parameters: int
    bucket_elements: int
    tokens: int
    steps: int
    threads: int
    seed: int

    def run(self, arm: Arm, rank: int) -> Run:
        """Makes an arm ready to train."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: the plain framework (`aggregator` is `None`), or bucket_moo.

    Args:
        micro_steps: M, micro-steps of a window.
        languages: K; slot s of a window (micro-step by micro-step, rank by rank) trains on language s mod K.
        once_a_window: whether gradients are exchanged once a window: each rank adds up its micro-steps.
    """

    micro_steps: int
    aggregator: str | None = None
    mode: str = "auto"
    languages: int = 1
    once_a_window: bool = False

    @property
    def name(self) -> str:
        """A name that no other arm has."""
        window = f"M = {self.micro_steps}" + " once a window" * self.once_a_window
        if self.aggregator is None:
            return f"plain, {window}"
        return f"{self.mode} {self.aggregator}, K = {self.languages}, {window}"

    @property
    def config(self) -> BucketMOOConfig:
        """The settings of a bucket_moo arm."""
        assert self.aggregator is not None
        languages = [f"language{index}" for index in range(self.languages)]
        return BucketMOOConfig(languages=languages, aggregator=self.aggregator, mode=self.mode)


def measure(rank: int, port: int, settings: Settings, arms: list[Arm], out: Path) -> None:
    """Measures time and bytes of all arms; rank 0 writes a list with an entry for each of them to `out`."""
    join(rank, port, settings)
    runs = [settings.run(arm, rank) for arm in arms]
    counted = [_count(run) for run in runs]  # a window of each, which also allocates the optimizer's state and the rows
    seconds: list[list[float]] = [[] for _ in arms]
    order = list(range(len(arms)))
    shuffle = random.Random(settings.seed).shuffle
    for _ in range(settings.steps):
        shuffle(order)
        for index in order:
            dist.barrier()
            began = time.perf_counter()
            runs[index].window()
            dist.barrier()
            seconds[index].append(time.perf_counter() - began)
    if rank == 0:
        found = [
            {"arm": dataclasses.asdict(arm) | {"name": arm.name}, "seconds": times} | run.facts() | bytes_sent
            for arm, run, times, bytes_sent in zip(arms, runs, seconds, counted, strict=True)
        ]
        out.write_text(json.dumps(found))


def measure_memory(rank: int, port: int, settings: Settings, arm: Arm, out: Path) -> None:
    """Measures the peak memory of one arm over two windows; rank 0 writes that of every rank to `out`.

    The peak is the kernel's high-water mark of resident memory, reset once the engine stands: making it needs more, in
    every arm alike. What was freed may stay resident: hence processes for each arm, and no large tensor on malloc's
    heap. What a rank has resident before the model is made (Python, libraries, connections) is taken off, because no
    model causes it.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    join(rank, port, settings)
    start = _resident_bytes("VmRSS")
    run = settings.run(arm, rank)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, see proc(5)
    for _ in range(2):
        run.window()
    mine = {"start_bytes": start, "peak_bytes": _resident_bytes("VmHWM") - start}
    everyone = gather(mine)
    if rank == 0:
        out.write_text(json.dumps({key: [each[key] for each in everyone] for key in mine}))


class Run:
    """An arm that trains, with its data. A subclass wraps the model and takes a window.

    Attributes:
        model: on all ranks and in all arms alike.
        parameters: of the model.
        batches: the arguments of the model, a micro-step each.
        moo: the pipeline of a bucket_moo arm.
    """

    moo: BucketMOO | None

    def __init__(self, settings: Settings, arm: Arm, rank: int) -> None:
        torch.manual_seed(settings.seed)
        self.arm = arm
        self.model = CausalLM(settings.parameters, settings.tokens)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        generator = torch.Generator().manual_seed(settings.seed + rank)
        shape = (arm.micro_steps, 1, settings.tokens)
        self.batches: list[dict[str, Any]] = [
            {"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, shape, generator=generator)
        ]
        if arm.aggregator is not None:
            for step, batch in enumerate(self.batches):
                batch["language"] = (step * settings.world_size + rank) % arm.languages

    def window(self) -> None:
        """Trains one window: its micro-steps and the optimizer step."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the arm turned out to be."""
        if self.moo is None:
            return {"parameters": self.parameters}
        return {
            "parameters": self.parameters,
            "buckets": len(self.moo.plan.buckets),
            "streaming": self.moo.streaming,
            "backend": self.moo.backend,
        }


def _count(run: Run) -> dict[str, Any]:
    """Counts the bytes of one window, in the two ways of `traffic`.

    Raises:
        AssertionError: bucket_moo's own counters say something else.
    """
    moo = run.moo
    own_before = dict(moo.exchange.sent_bytes) if moo else {}
    dist.barrier()
    before = traffic.socket_bytes()
    with traffic.record() as calls:
        run.window()
    dist.barrier()  # every rank has read what was sent to it, so it has been sent
    sockets = traffic.socket_bytes() - before
    if moo:
        own = {name: sent - own_before.get(name, 0) for name, sent in moo.exchange.sent_bytes.items()}
        carried = traffic.exchange_counters(calls)
        assert own == carried, f"{run.arm.name}: Exchange counted {own}, the collectives carried {carried}"
    everyone = gather(
        {
            "by_purpose": traffic.sent_by(calls, "purpose"),
            "by_operation": traffic.sent_by(calls, "operation"),
            "gradients": traffic.gradient_bytes(calls),
            "sockets": sockets,
            "row_store": moo.row_bytes if moo else 0,
        }
    )
    return {"ranks": everyone}


def join(rank: int, port: int, settings: Settings) -> None:
    """Makes this process a rank."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(settings.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(settings.threads),
    )
    traffic.install()
    prepare_rank(quiet=True)


def gather(mine: Any) -> list[Any]:
    """Returns what every rank has, rank by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: memory can be measured on Linux only")
    return int(found.group(1)) * 1024
