"""One rank of the step benchmark: the arms, the model, and how time, memory and bytes are measured.

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
from torch import Tensor, nn

import bucketmoo_ds
from bucketmoo_ds.training.environment import prepare_rank

VOCABULARY, WIDTH, HEADS = 4096, 384, 6

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h: blocks of at least this many bytes go back to the system when freed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms of a process set share.

    Args:
        dtype: `fp32` or `bf16`.
        parameters: of the model, about; whole layers are added until they are reached.
        bucket_elements: DeepSpeed's `reduce_bucket_size`.
        tokens: of a micro-batch, one sequence.
        stage: ZeRO-1 or ZeRO-2.
        steps: timed windows of every arm.
        threads: of every rank.
    """

    world_size: int
    dtype: str
    parameters: int
    bucket_elements: int
    tokens: int
    stage: int
    steps: int
    threads: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: plain DeepSpeed (`aggregator` is `None`), or bucket_moo.

    Args:
        micro_steps: M, micro-steps of a window.
        languages: K; slot s of a window (micro-step by micro-step, rank by rank) trains on language s mod K.
    """

    micro_steps: int
    aggregator: str | None = None
    mode: str = "auto"
    languages: int = 1

    @property
    def name(self) -> str:
        """A name that no other arm has."""
        if self.aggregator is None:
            return f"plain, M = {self.micro_steps}"
        return f"{self.mode} {self.aggregator}, K = {self.languages}, M = {self.micro_steps}"


def measure(rank: int, port: int, settings: Settings, arms: list[Arm], out: Path) -> None:
    """Measures time and bytes of all arms; rank 0 writes a list with an entry for each of them to `out`."""
    _join(rank, port, settings)
    runs = [_Run(settings, arm, rank) for arm in arms]
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
    _join(rank, port, settings)
    start = _resident_bytes("VmRSS")
    run = _Run(settings, arm, rank)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, see proc(5)
    for _ in range(2):
        run.window()
    mine = {"start_bytes": start, "peak_bytes": _resident_bytes("VmHWM") - start}
    everyone = _gather(mine)
    if rank == 0:
        out.write_text(json.dumps({key: [each[key] for each in everyone] for key in mine}))


class _Run:
    """An engine of one arm, with its data."""

    def __init__(self, settings: Settings, arm: Arm, rank: int) -> None:
        torch.manual_seed(settings.seed)
        model = CausalLM(settings.parameters, settings.tokens)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.arm, self.rank, self.world_size = arm, rank, settings.world_size
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.engine, *_ = bucketmoo_ds.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(settings, arm)
        )
        generator = torch.Generator().manual_seed(settings.seed + rank)
        shape = (arm.micro_steps, 1, settings.tokens)
        self.batches = torch.randint(VOCABULARY, shape, generator=generator)

    def window(self) -> None:
        for step, ids in enumerate(self.batches):
            batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
            if self.arm.aggregator is not None:
                batch["language"] = (step * self.world_size + self.rank) % self.arm.languages
            self.engine.backward(self.engine(**batch))
            self.engine.step()

    def facts(self) -> dict[str, Any]:
        """What the arm turned out to be."""
        if self.arm.aggregator is None:
            return {"parameters": self.parameters}
        moo = self.engine.moo
        return {
            "parameters": self.parameters,
            "buckets": len(moo.plan.buckets),
            "streaming": moo.streaming,
            "backend": moo.backend,
        }


def _count(run: _Run) -> dict[str, Any]:
    """Counts the bytes of one window, in the two ways of `traffic`.

    Raises:
        AssertionError: bucket_moo's own counters say something else.
    """
    moo = run.engine.moo if run.arm.aggregator is not None else None
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
    everyone = _gather(
        {
            "by_purpose": traffic.sent_by(calls, "purpose"),
            "by_operation": traffic.sent_by(calls, "operation"),
            "gradients": traffic.gradient_bytes(calls),
            "sockets": sockets,
            "row_store": moo.row_bytes if moo else 0,
        }
    )
    return {"ranks": everyone}


def _deepspeed_config(settings: Settings, arm: Arm) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": arm.micro_steps,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.stage, "reduce_bucket_size": settings.bucket_elements},
        "steps_per_print": 10**9,
    }
    if settings.dtype != "fp32":
        config[settings.dtype] = {"enabled": True}
    if arm.aggregator is not None:
        config["bucket_moo"] = {
            "languages": [f"language{index}" for index in range(arm.languages)],
            "aggregator": arm.aggregator,
            "mode": arm.mode,
        }
    return config


class CausalLM(nn.Module):
    """A pre-norm transformer with a tied head and as many layers as the parameters ask for.

    It computes in float32, whatever the dtype of its parameters and so of their gradients: a CPU without bf16
    instructions takes 15 times as long for a bf16 product, and would hide what this benchmark is for.
    """

    def __init__(self, parameters: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(length, WIDTH)
        one = sum(p.numel() for p in Layer().parameters())
        rest = (VOCABULARY + length) * WIDTH
        self.layers = nn.ModuleList(Layer() for _ in range(max(1, round((parameters - rest) / one))))
        self.norm = LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss per target token."""
        hidden = self.embed(input_ids).float() + self.position.weight[: input_ids.shape[1]].float()
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.norm(hidden) @ self.embed.weight.float().T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Layer(nn.Module):
    """Causal attention, then an MLP of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = LayerNorm(WIDTH), LayerNorm(WIDTH)
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(Linear(WIDTH, 4 * WIDTH), nn.GELU(), Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, T, WIDTH]` to the same."""
        shape = (*hidden.shape[:2], 3, HEADS, WIDTH // HEADS)
        query, key, value = self.qkv(self.attention_norm(hidden)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Linear(nn.Linear):
    """`nn.Linear` in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight.float(), self.bias.float())


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden, self.normalized_shape, self.weight.float(), self.bias.float())


def _join(rank: int, port: int, settings: Settings) -> None:
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


def _gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: memory can be measured on Linux only")
    return int(found.group(1)) * 1024
