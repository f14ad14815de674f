"""Worker: runs one feature of DeepSpeed on one stage with bucket_moo, and says what came of it."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import compare_with_reference
import deepspeed
import torch
import torch.distributed as dist
import toy
import worker
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from setup_engine import LANGUAGES, generator_for, make_engine, settings, train_window
from torch import nn

from bucketmoo_ds.errors import BucketMOOError

SEED = 11


def run(scenario: str, stage: int, **arguments: Any) -> dict[str, Any]:
    """Returns the largest error against the reference (0 where bits were compared), or the error that was raised and
    whether it is one of ours."""
    try:
        return {"error": SCENARIOS[scenario](stage, **arguments)}
    except Exception as error:
        traceback.print_exc()
        return {"refused": str(error), "kind": type(error).__name__, "ours": isinstance(error, BucketMOOError)}
    finally:
        groups.mpu = groups.mesh_device = None  # DeepSpeed keeps them for the next engine


def parity(stage: int, **case: Any) -> float:
    return float(compare_with_reference.run(["auto"], stage=stage, **case)["gradient"])


def coalesced(stage: int) -> float:
    engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=SEED)
    with engine.coalesce_grad_reduction():
        train_window(engine, generator_for(SEED))
    raise AssertionError("it was taken")


def bare_no_sync(stage: int) -> float:
    """Micro-steps that the JSON does not know of."""
    engine = make_engine(settings(stage, moo={}), seed=SEED)
    for step in range(2):
        batch = toy.micro_batch(0, generator_for(step))
        if step == 0:
            with engine.no_sync():
                engine.backward(engine(**batch, language="de"))
        else:
            engine.backward(engine(**batch, language="de"))
    engine.step()
    raise AssertionError("it was taken")


def compiled(stage: int) -> float:
    """`engine.compile()`: the weights after two windows are those of the engine that was not compiled. The compiler's
    front end alone is at work, so that the operations are the same."""
    ends = []
    for compiles in (False, True):
        engine = make_engine(settings(stage, micro_steps=2, moo={}), seed=SEED)
        if compiles:
            engine.compile(backend="eager")
        generator = generator_for(SEED)
        for window in range(2):
            train_window(engine, generator, window)
        ends.append(torch.cat([each.flatten() for each in worker.weights(engine.module)]))
    return float((ends[0] - ends[1]).norm() / ends[0].norm())


def resumed(stage: int) -> float:
    """Two windows, a checkpoint, two more: another engine that loads it ends with the same bits."""
    config = settings(stage, micro_steps=2, moo={"aggregator": "pcgrad"})
    whole = make_engine(config, seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)  # rank 0's, which is there until all have loaded
        generator = generator_for(SEED)
        for window in range(2):
            train_window(whole, generator, window)
        whole.save_checkpoint(folders[0])
        state = generator.get_state()
        engine = make_engine(config, seed=SEED + 1)
        engine.load_checkpoint(folders[0])
        ends = []
        for each in (whole, engine):
            generator.set_state(state)
            for window in range(2, 4):
                train_window(each, generator, window)
            ends.append(torch.cat([weight.flatten() for weight in worker.weights(each.module)]))
        dist.barrier()
    return float((ends[0] != ends[1]).sum())


def pipeline(stage: int) -> float:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    module = deepspeed.pipe.PipelineModule(layers=layers, num_stages=worker.WORLD_SIZE, loss_fn=nn.MSELoss())
    return _initialize(module, settings(stage, micro_steps=2, moo={}))


def experts(stage: int) -> float:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.experts = MoE(8, nn.Linear(8, 8), num_experts=2)

    model = Model()
    params = {"params": list(model.parameters()), "name": "all"}
    marked = split_params_into_different_moe_groups_for_optimizer(params)
    return _initialize(model, settings(stage, moo={}), marked)


def sequence_parallel(stage: int) -> float:
    sizes = {"sequence_parallel_size": worker.WORLD_SIZE, "data_parallel_size": 1}
    return _initialize(toy.ToyLM(), settings(stage, moo={}, **sizes))


def model_parallel(stage: int) -> float:
    """With an `mpu` of the user's."""
    mine = [dist.new_group([rank]) for rank in range(worker.WORLD_SIZE)][worker.RANK]
    mpu = SimpleNamespace(
        get_model_parallel_rank=lambda: worker.RANK,
        get_model_parallel_world_size=lambda: worker.WORLD_SIZE,
        get_model_parallel_group=lambda: dist.group.WORLD,
        get_data_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda: 1,
        get_data_parallel_group=lambda: mine,
    )
    return _initialize(toy.ToyLM(), settings(stage, moo={}), mpu=mpu)


def _initialize(module: nn.Module, config: dict[str, Any], params: Any = None, **arguments: Any) -> float:
    """Where nothing is refused at start-up, there is a feature that no test trains with."""
    optimizer = torch.optim.Adam(params or module.parameters(), lr=0.01)
    deepspeed.initialize(model=module, optimizer=optimizer, config=config, **arguments)
    raise AssertionError(f"it started, with languages {LANGUAGES}")


SCENARIOS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        parity,
        coalesced,
        bare_no_sync,
        compiled,
        resumed,
        pipeline,
        experts,
        sequence_parallel,
        model_parallel,
    )
}

if __name__ == "__main__":
    worker.serve(run)
