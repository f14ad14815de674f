"""Worker: counts what one window sends under FSDP2, plain and with bucket_moo."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import worker
from count_bytes import make_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import bucketmoo_ds
from benchmarks import traffic


def run(
    *,
    seed: int,
    register: bool,
    replicas: int = 1,
    micro_steps: int = 1,
    once_a_window: bool = False,
    dtype: str = "fp32",
    table: list[int] | None = None,
    mode: str = "auto",
    **moo: Any,
) -> dict[str, Any]:
    """Trains two windows and counts the second, when nothing is done for the first time any more.

    Args:
        register: whether bucket_moo is, or plain FSDP2 runs.
        table: the language of each rank; left out, rank r trains on language r.
        moo: settings.
    """
    torch.manual_seed(seed)
    model = make_model(seed)
    shapes = [parameter.shape for parameter in model.parameters()]
    settings: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16 if dtype == "bf16" else None)}
    if replicas > 1:
        shape = (replicas, worker.WORLD_SIZE // replicas)
        settings["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        fully_shard(linear, **settings)
    fully_shard(model, **settings)
    languages = table or list(range(worker.WORLD_SIZE))
    session = None
    if register:
        config = bucketmoo_ds.BucketMOOConfig(
            languages=[f"l{index}" for index in range(max(languages) + 1)], mode=mode, **moo
        )
        session = bucketmoo_ds.fsdp2.register(model, config, micro_steps=micro_steps, once_a_window=once_a_window)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def window() -> None:
        for step in range(micro_steps):
            if once_a_window and not register:
                model.set_requires_gradient_sync(step == micro_steps - 1)
            language = session.language(languages[worker.RANK]) if session else contextlib.nullcontext()
            with language:
                (model(torch.randn(2, model.width)) / micro_steps).backward()
        optimizer.step()
        optimizer.zero_grad()

    window()
    exchange = session.moo.exchange if session else None
    own, between = (dict(exchange.sent_bytes), dict(exchange.sent_between_nodes)) if exchange else ({}, {})
    dist.barrier()
    before = traffic.socket_bytes()
    with traffic.record() as calls:
        window()
    dist.barrier()  # every rank has read what was sent to it, so it has been sent
    found: dict[str, Any] = {
        "shapes": shapes,
        "numel": sum(shape.numel() for shape in shapes),
        "buckets": len(linears),
        "sent": traffic.sent_by(calls, "purpose"),
        "gradients": traffic.gradient_bytes(calls),
        "counted": sum(call.sent_bytes for call in calls),
        "calls": len(calls),
        "sockets": traffic.socket_bytes() - before,
    }
    if exchange:
        found |= {
            "own": {name: sent - own.get(name, 0) for name, sent in exchange.sent_bytes.items()},
            "own_between": {name: sent - between.get(name, 0) for name, sent in exchange.sent_between_nodes.items()},
            "carried": traffic.exchange_counters(calls),
            "carried_between": carried_between(calls, exchange.ranks_per_node),
            "streaming": session.moo.streaming,
            "row_bytes": session.moo.row_bytes,
        }
    return found


def carried_between(calls: list[traffic.Call], ranks_per_node: int) -> dict[str, int]:
    """Of what this rank has sent, what went to other nodes, where each other rank of the group gets as much."""
    node, total = worker.RANK // ranks_per_node, {}
    for call in calls:
        if call.counter:
            elsewhere = sum(rank // ranks_per_node != node for rank in call.ranks)
            share = call.sent_bytes * elsewhere // (len(call.ranks) - 1)
            total[call.counter] = total.get(call.counter, 0) + share
    return total


if __name__ == "__main__":
    traffic.install()
    worker.serve(run)
