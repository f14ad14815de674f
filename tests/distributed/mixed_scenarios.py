"""Worker: what a run on mixed languages sends, what it does when ranks go wrong, and whether it resumes."""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import worker
from mixed_wrappers import LANGUAGES, Case, Run, batch_of, documents_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import bucketmoo_ds
from benchmarks import traffic


def run(*, what: str, **arguments: Any) -> Any:
    return SCENARIOS[what](**arguments)


def batches(case: Case, windows: int) -> list[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(100 * case.seed + worker.RANK)
    return [[batch_of(case, documents_of(case, generator)) for _ in range(case.micro_steps)] for _ in range(windows)]


def train(run: Run, windows: list[list[dict[str, Any]]]) -> None:
    for window in windows:
        if run.case.expect:
            run.session.expect(window)
        for number, batch in enumerate(window):
            run.micro_step(batch, last=number == len(window) - 1)
        run.step()


# --- bytes ----------------------------------------------------------------------------------------------------------


def count(*, seed: int, **fields: Any) -> dict[str, Any]:
    """What three windows send, plain and mixed, of which the first takes a Gram and the others none."""
    found: dict[str, Any] = {}
    for name in ("plain", "mixed"):
        case = Case(seed=seed, moo={"gram_every": 4, "aggregator": "upgrad"}, off=name == "plain", **fields)
        run = Run(case)
        data = batches(case, 6)
        train(run, data[:1])  # ZeRO-3 and FSDP note the order of modules
        if run.session is not None:
            found["own"] = dict(run.session.exchange.sent_bytes)
        dist.barrier()
        for part, windows in (("without", data[1:4]), ("with", data[4:])):
            with traffic.record() as calls:
                train(run, windows)
            found[f"{name} {part}"] = traffic.sent_by(calls, "purpose")
            if run.session is not None:
                found[f"carried {part}"] = traffic.exchange_counters(calls)
        if run.session is not None:
            found["own"] = {
                each: sent - found["own"].get(each, 0) for each, sent in run.session.exchange.sent_bytes.items()
            }
            found["blocks"] = len(run.session.plan.blocks)
    return found


# --- resume ---------------------------------------------------------------------------------------------------------


def resume(*, folder: str, seed: int, **fields: Any) -> dict[str, Any]:
    """Trains four windows, two of which are done once more from a checkpoint, by an engine of other weights."""
    case = Case(seed=seed, moo={"gram_every": 2, "aggregator": "cagrad"}, adam=True, **fields)
    data = batches(case, 4)
    straight = Run(case)
    train(straight, data[:2])
    straight.model.save_checkpoint(folder)
    train(straight, data[2:])
    resumed = Run(case)
    with deepspeed.zero.GatheredParameters(list(resumed.module.parameters()), modifier_rank=0):
        for parameter in resumed.module.parameters():
            parameter.data.add_(1.0)
    path, _ = resumed.model.load_checkpoint(folder)
    assert path is not None
    train(resumed, data[2:])
    return {
        name: {
            "parameters": worker.checksum(run.parameters().values()),
            "weights": worker.checksum([run.session.last.weights, run.session.last.gram]),
            "windows": run.session.windows,
        }
        for name, run in (("straight", straight), ("resumed", resumed))
    }


def resume_session(*, seed: int, **fields: Any) -> list[str]:
    """The same of a session's own state, beside a model's and an optimizer's."""
    case = Case(seed=seed, moo={"gram_every": 2, "aggregator": "cagrad"}, **fields)
    data = batches(case, 4)
    found = []
    straight, resumed = Run(case), Run(case)
    train(straight, data[:2])
    state = json.loads(json.dumps(straight.session.state_dict(), allow_nan=False))
    resumed.session.load_state_dict(state)
    resumed.model.load_state_dict(straight.model.state_dict())
    for run in (straight, resumed):
        train(run, data[2:])
        found.append(worker.checksum([*run.parameters().values(), run.session.last.weights]))
    return found


# --- loss scales ----------------------------------------------------------------------------------------------------


def overflow(*, seed: int, **fields: Any) -> dict[str, Any]:
    """A window whose gradients are infinite, which GradScaler skips, and one that is not."""
    case = Case(seed=seed, moo={"gram_every": 1}, **fields)
    run, twin = Run(case), Run(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.session.close()
    run.session = bucketmoo_ds.mixed.register(run.model, case.config, loss_scale=scaler.get_scale)
    (poisoned,), (batch,) = batches(case, 2)
    before = worker.checksum(run.parameters().values())
    for factor, each in ((float("inf"), poisoned), (1.0, batch)):
        scaler.scale(run.model(**each) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        if factor != 1.0:
            assert worker.checksum(run.parameters().values()) == before, "the step was to be skipped"
    train(twin, [[batch]])
    errors = [
        float((one - other).norm() / other.norm())
        for one, other in zip(run.parameters().values(), twin.parameters().values(), strict=True)
    ]
    kept, wanted = (each.session.estimate.gram()[0] for each in (run, twin))
    return {
        "error": max(errors),
        "gram": float((kept - wanted).norm() / wanted.norm()),
        "windows": run.session.windows,
        "tokens": run.session.last.target_tokens == twin.session.last.target_tokens,
    }


# --- faults ---------------------------------------------------------------------------------------------------------


def fault(*, how: str, seed: int, **fields: Any) -> None:
    """Something is wrong on rank 1 alone. Every rank is to raise."""
    odd = worker.RANK == 1
    moo = {"gram_every": 3} if how == "settings" and odd else {}
    case = Case(seed=seed, moo=moo, **fields)
    run = Run(case)
    window = batches(case, 1)[0]
    if how == "language" and odd:
        del window[0]["language"]
    if how == "unknown" and odd:
        window[0]["language"] = ["xx"] * len(window[0]["language"])
    if how == "expect" and odd:
        run.session.expect(window)
    train(run, [window])


def refused(*, how: str) -> None:
    """What has to be refused at register, or in the first forward pass."""
    config = bucketmoo_ds.BucketMOOConfig(languages=list(LANGUAGES), mode="mixed")
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    if how == "tensor parallel":
        split = parallelize_module(module, init_device_mesh("cpu", (worker.WORLD_SIZE,)), {"0": ColwiseParallel()})
        bucketmoo_ds.mixed.register(split, config)
        split(torch.randn(2, 4), language=["de", "fr"])
    if how == "ddp":
        bucketmoo_ds.ddp.register(DistributedDataParallel(module), config)
    if how == "fsdp1":
        bucketmoo_ds.fsdp1.register(FullyShardedDataParallel(module, device_id=torch.device("cpu")), config)
    if how == "fsdp2":
        bucketmoo_ds.fsdp2.register(fully_shard(module), config)
    if how == "sum":
        Run(Case(seed=1, wrapper="zero", stage=2, dtype="float32", top={"gradient_allreduce_op": "sum"}))
    if how == "late fsdp1":
        bucketmoo_ds.mixed.register(FullyShardedDataParallel(module, device_id=torch.device("cpu")), config)


SCENARIOS = {each.__name__: each for each in (count, resume, resume_session, overflow, fault, refused)}


if __name__ == "__main__":
    traffic.install()
    worker.serve(run)
