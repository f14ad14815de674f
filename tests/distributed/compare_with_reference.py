"""Worker: trains a few windows with bucket_moo and compares every combined gradient with the float64 reference."""

from __future__ import annotations

import copy
import random
import traceback
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.engine import create_aggregator


def engine_for(case: dict[str, Any], model: torch.nn.Module) -> Any:
    params: Any = [p for p in model.parameters() if p.requires_grad]
    if case.get("groups"):
        params = [{"params": params[0::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(params, lr=0.05)
    engine, *_ = bucketmoo_ds.initialize(model=model, optimizer=optimizer, config=json_for(case))
    return engine


def json_for(case: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": case["micro_steps"],
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": case["stage"],
            "reduce_bucket_size": case.get("bucket_size", 1500),
            "overlap_comm": case.get("overlap", False),
            "round_robin_gradients": case.get("round_robin", False),
        },
        "gradient_clipping": case.get("clip", 0.0),
        "steps_per_print": 10**9,
        "bucket_moo": {
            "languages": [f"l{index}" for index in range(case["languages"])],
            "aggregator": case.get("aggregator", "mgda"),
            "granularity": case.get("granularity", "bucket"),
            "weighting": case.get("weighting", "language"),
            "mode": case.get("mode", "auto"),
        },
    }
    if case.get("dtype", "fp32") != "fp32":
        config[case["dtype"]] = {"enabled": True}
        if case["dtype"] == "fp16":
            config["fp16"]["initial_scale_power"] = 4
    if case.get("accumulate"):
        config["data_types"] = {"grad_accum_dtype": case["accumulate"]}
    return config


def table_of(case: dict[str, Any], window: int) -> list[list[int]]:
    """Languages of the slots, [M][W]: in rotation; a rank keeps its language on ZeRO-1."""
    micro_steps = 1 if case["stage"] == 1 else case["micro_steps"]
    slots = [(window * 2 + slot) % case["languages"] for slot in range(micro_steps * worker.WORLD_SIZE)]
    rows = [slots[start : start + worker.WORLD_SIZE] for start in range(0, len(slots), worker.WORLD_SIZE)]
    return rows * (case["micro_steps"] // micro_steps)


def run(case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(case["seed"])
    model = toy.ToyLM(**case.get("model", {}))
    twin = copy.deepcopy(model)
    engine = engine_for(case, model)
    optimizer = engine.optimizer
    twin = twin.to(dtype=next(engine.module.parameters()).dtype)
    generator = torch.Generator().manual_seed(case["seed"] * 100 + worker.RANK)
    errors, weight_errors = [], []
    for window in range(2):
        twin.load_state_dict(engine.module.state_dict())
        micro_gradients = []
        for row in table_of(case, window):
            language = row[worker.RANK]
            batch = toy.micro_batch(language, generator, ragged=case.get("ragged", True))
            micro_gradients.append(own_gradient(twin, batch, language, engine))
            loss = engine(batch | {"language": f"l{language}"})if case.get("positional") else engine(
                **batch, language=f"l{language}"
            )
            engine.backward(loss)
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        combined = full_gradient(optimizer)
        scale = optimizer.loss_scale
        everyone: list[Any] = [None] * worker.WORLD_SIZE
        dist.all_gather_object(everyone, micro_gradients)
        config = engine.moo.config
        expected, weights = reference.resolve_window(
            [micro for rank in everyone for micro in rank],
            blocks_of(engine.moo.plan),
            micro_steps=case["micro_steps"],
            aggregator=create_aggregator(config),
            weighting=config.weighting,
            seed=0,
        )
        for block, names in blocks_of(engine.moo.plan).items():
            found = torch.cat([combined[name].flatten() / scale for name in names])
            wanted = torch.cat([expected[name].flatten() for name in names])
            if case.get("aggregator") != "pcgrad" or case["languages"] == 2:
                errors.append(float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)))
                number = engine.moo.plan.blocks.index(block)
                ours = engine.moo.last.weights[number, list(engine.moo.last.present)]
                weight_errors.append(float((ours - weights[block]).abs().max()))
        engine.step()
    return {
        "error": max(errors, default=0.0),
        "weights": max(weight_errors, default=0.0),
        "streaming": engine.moo.streaming,
        "blocks": len(engine.moo.plan.blocks),
        "buckets": len(engine.moo.plan.buckets),
        "parameters": checksum(engine.module),
        "norm": float(engine.get_global_grad_norm() or 0.0),
    }


def own_gradient(twin: torch.nn.Module, batch: dict[str, Any], language: int, engine: Any) -> reference.MicroGradient:
    """The gradient that DeepSpeed is handed for this micro-batch, before anything is reduced."""
    twin.zero_grad()
    loss = twin(**batch) / engine.gradient_accumulation_steps()
    (loss.float() * engine.optimizer.loss_scale).backward()
    scale = engine.optimizer.loss_scale
    return reference.MicroGradient(
        language,
        toy.tokens_of(batch),
        {
            name: (torch.zeros_like(p) if p.grad is None else p.grad.clone()).double() / scale
            for name, p in twin.named_parameters()
            if p.requires_grad
        },
    )


def blocks_of(plan: Any) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {name: [] for name in plan.blocks}
    for parameter, block in zip(plan.parameters, plan.block_of, strict=True):
        blocks[plan.blocks[block]].append(parameter.name)
    return blocks


def full_gradient(optimizer: Any) -> dict[str, torch.Tensor]:
    """The gradient that the optimizer is about to use, put together from all ranks' partitions."""
    found = {}
    for group, params in enumerate(optimizer.round_robin_bit16_groups):
        mine = optimizer.averaged_gradients[group].flat_partition
        parts = [torch.empty_like(mine) for _ in range(worker.WORLD_SIZE)]
        dist.all_gather(parts, mine)
        flat = torch.cat(parts).double()
        for param, offset in zip(params, optimizer.round_robin_bit16_offsets[group], strict=True):
            found[optimizer.param_names[param]] = flat[offset : offset + param.numel()]
    return found


def checksum(module: torch.nn.Module) -> str:
    import hashlib

    data = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in module.parameters())
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    worker.start()
    results = []
    for case in worker.arguments():
        random.seed(case["seed"])
        try:
            results.append(run(case))
        except Exception as error:
            traceback.print_exc()
            results.append({"failed": f"{type(error).__name__}: {error}"})
            break
    worker.leave(results)
