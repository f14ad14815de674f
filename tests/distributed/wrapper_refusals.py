"""Models and settings that `register` refuses, on two ranks; scenarios of `wrappers_contract.py`.

Each function makes a model, or a model and arguments of `config` and `register`. Its name is `<wrapper>_<case>`, or the
case with the wrapper as its argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._comm_hooks.default_hooks import reduce_scatter_hook
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from wrappers import WRAPPERS, config, ddp, fsdp1, fsdp2, two_dimensional

import bucketmoo_ds


def refused(wrapper: str, case: str) -> None:
    register = getattr(bucketmoo_ds, wrapper).register
    found = CASES[wrapper][case]()
    model, settings, arguments = found if isinstance(found, tuple) else (found, {}, {})
    register(model, config(**settings), **arguments)


# --- any wrapper --------------------------------------------------------------------------------------------------


def twice(wrapper: str) -> nn.Module:
    model: nn.Module = WRAPPERS[wrapper].wrap(toy.ToyLM())
    getattr(bucketmoo_ds, wrapper).register(model, config())
    return model


def optimizer_in_backward(wrapper: str) -> nn.Module:
    module = toy.ToyLM()
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    return WRAPPERS[wrapper].wrap(module)


def post_accumulate(wrapper: str) -> nn.Module:
    model: nn.Module = WRAPPERS[wrapper].wrap(toy.ToyLM()) if wrapper == "fsdp2" else toy.ToyLM()
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model if wrapper == "fsdp2" else WRAPPERS[wrapper].wrap(model)


def nothing_to_train(wrapper: str) -> nn.Module:
    return WRAPPERS[wrapper].wrap(toy.ToyLM().requires_grad_(False))


def data_and_tensor() -> DeviceMesh:
    return init_device_mesh("cpu", (1, worker.WORLD_SIZE), mesh_dim_names=("data", "tensor"))


def tensor_parallel(wrapper: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = data_and_tensor()
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel()})
    return WRAPPERS[wrapper].wrap(module, device_mesh=mesh["data"])


# --- DDP ----------------------------------------------------------------------------------------------------------


def ddp_no_ddp() -> nn.Module:
    return toy.ToyLM()


def ddp_hooked() -> nn.Module:
    model = ddp(toy.ToyLM())
    model.register_comm_hook(None, noop_hook)
    return model


def ddp_built_in_hook() -> nn.Module:
    model = ddp(toy.ToyLM())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    return model


def ddp_mixed_precision() -> nn.Module:
    return ddp(toy.ToyLM(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))


def ddp_python_reducer() -> nn.Module:
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        return ddp(toy.ToyLM())


def ddp_ignored() -> nn.Module:
    module = toy.ToyLM()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["head.weight"])
    return ddp(module)


def ddp_delayed() -> nn.Module:
    module = toy.ToyLM()
    named = list(module.named_parameters())[-1:]
    return ddp(module, delay_all_reduce_named_params=named, param_to_hook_all_reduce=module.embed.weight)


def ddp_sparse() -> nn.Module:
    module = toy.ToyLM()
    module.embed = nn.Embedding(toy.VOCABULARY, 13, sparse=True)
    return ddp(module)


# --- FSDP1 --------------------------------------------------------------------------------------------------------


def fsdp1_no_fsdp() -> nn.Module:
    return toy.ToyLM()


def fsdp1_fsdp2() -> nn.Module:
    return fully_shard(toy.ToyLM())


def fsdp1_hybrid() -> nn.Module:
    """One replica of two ranks."""
    return fsdp1(toy.ToyLM(), strategy="HYBRID_SHARD", device_mesh=init_device_mesh("cpu", (1, 2)))


def fsdp1_hybrid_zero2() -> nn.Module:
    """Two replicas of one rank, which FSDP1 makes NO_SHARD."""
    return fsdp1(toy.ToyLM(), strategy="_HYBRID_SHARD_ZERO2", device_mesh=init_device_mesh("cpu", (2, 1)))


def fsdp1_hooked() -> nn.Module:
    model = fsdp1(toy.ToyLM())
    model.register_comm_hook(None, reduce_scatter_hook)
    return model


def fsdp1_groups() -> nn.Module:
    module = toy.ToyLM()
    module.layers[1] = fsdp1(module.layers[1], process_group=dist.new_group([0, 1]))
    return fsdp1(module, layers=False)


def fsdp1_ignored() -> nn.Module:
    module = toy.ToyLM()
    return fsdp1(module, ignored_states=[module.head.weight])


def fsdp1_ignored_flat() -> nn.Module:
    module = toy.ToyLM()
    return fsdp1(module, ignored_states=[module.head.weight], use_orig_params=False)


def fsdp1_added() -> nn.Module:
    """An adapter that is added after wrapping."""
    module = toy.ToyLM()
    model = fsdp1(module)
    module.head.down = nn.Parameter(torch.ones(2, 13))
    return model


def fsdp1_tied() -> nn.Module:
    module = toy.ToyLM(tied=True)
    module.head = fsdp1(module.head)
    return fsdp1(module)


def fsdp1_post_accumulate_flat() -> nn.Module:
    model = fsdp1(toy.ToyLM(), use_orig_params=False)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def fsdp1_other_torch() -> nn.Module:
    """A torch that keeps the layout of flat parameters elsewhere."""
    model = fsdp1(toy.ToyLM())
    del model._handle.flat_param._is_padding_mask
    return model


# --- FSDP2 --------------------------------------------------------------------------------------------------------


def fsdp2_not_sharded() -> nn.Module:
    model = toy.ToyLM()
    fully_shard(model.layers[0])
    return model


def fsdp2_several_groups() -> nn.Module:
    """The head's parameters on a mesh of their own, which torch has from 2.13 on."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    model = toy.ToyLM()
    head, alone = model.head.weight, FSDPMeshInfo(mesh=two_dimensional(worker.WORLD_SIZE)["shard"], shard_mesh_dim=0)

    def placement(each: Any) -> Any:
        return ShardPlacementResult(Shard(0), alone) if each is head else None

    return fully_shard(model, shard_placement_fn=placement)


class CustomReduceScatter(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *arguments: Any, **named: Any) -> None:
        raise AssertionError


def fsdp2_custom_reduce_scatter() -> nn.Module:
    model = fsdp2(toy.ToyLM())
    model.layers[1].set_custom_reduce_scatter(CustomReduceScatter())
    return model


def fsdp2_own_memory() -> nn.Module:
    """Of the kind of SymmMem, which needs GPUs."""
    model = fsdp2(toy.ToyLM())
    model.set_allocate_memory_from_process_group_for_comm(True)
    return model


def fsdp2_all_reduce_hook() -> nn.Module:
    model = fsdp2(toy.ToyLM())
    model.layers[0].set_all_reduce_hook(lambda gradient: None)
    return model


def fsdp2_ignored() -> nn.Module:
    model = toy.ToyLM()
    return fully_shard(model, ignored_params={model.head.weight})


def fsdp2_added_later() -> nn.Module:
    model = fsdp2(toy.ToyLM())
    model.adapters.append(nn.Linear(13, 13))
    return model


def fsdp2_tensor_parallel() -> nn.Module:
    model, mesh = toy.ToyLM(), data_and_tensor()
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], {"0": ColwiseParallel(), "2": ColwiseParallel()})
        layer[3].requires_grad_(False)
    model.embed.requires_grad_(False)
    model.head.requires_grad_(False)
    return fsdp2(model, mesh=mesh["data"])


def fsdp2_tensor_parallel_in_part() -> nn.Module:
    model, mesh = toy.ToyLM(), data_and_tensor()
    parallelize_module(model.layers[0], mesh["tensor"], {"0": ColwiseParallel()})
    return fsdp2(model, mesh=mesh["data"])


def fsdp2_three_dimensions() -> nn.Module:
    module = nn.Linear(4, 4, bias=False)
    names = ("replicate", "shard", "tensor")
    mesh = init_device_mesh("cpu", (1, 1, worker.WORLD_SIZE), mesh_dim_names=names)
    parallelize_module(module, mesh["tensor"], ColwiseParallel())
    return fully_shard(module, mesh=mesh["replicate", "shard"])


def fsdp2_several_meshes() -> nn.Module:
    model = toy.ToyLM()
    fully_shard(model.layers[0], mesh=two_dimensional(1))
    return fully_shard(model)


def fsdp2_replicas_without_shards() -> nn.Module:
    return fsdp2(toy.ToyLM(), mesh=two_dimensional(worker.WORLD_SIZE))


def fsdp2_replicated() -> nn.Module:
    model = toy.ToyLM()
    replicate(model)
    return model


def fsdp2_permuted() -> nn.Module:
    return fsdp2(toy.ToyLM(), mesh=DeviceMesh("cpu", list(range(worker.WORLD_SIZE))[::-1]))


def fsdp2_two_stages_on_one_node() -> Any:
    return fsdp2(toy.ToyLM()), {"exchange": "two_stage"}, {}


def fsdp2_streaming_over_layers() -> Any:
    return fsdp2(toy.ToyLM()), {"granularity": "model", "mode": "streaming"}, {}


ANY: dict[str, tuple[Callable[[str], nn.Module], ...]] = {
    "ddp": (twice, optimizer_in_backward, post_accumulate, tensor_parallel),
    "fsdp1": (twice, optimizer_in_backward, post_accumulate, tensor_parallel, nothing_to_train),
    "fsdp2": (twice, post_accumulate, nothing_to_train),
}
CASES: dict[str, dict[str, Callable[[], Any]]] = {
    wrapper: {function.__name__: functools.partial(function, wrapper) for function in functions}
    | {
        name.removeprefix(f"{wrapper}_"): function
        for name, function in list(globals().items())
        if name.startswith(f"{wrapper}_")
    }
    for wrapper, functions in ANY.items()
}
