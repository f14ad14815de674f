"""Worker: what FSDP2 refuses to start with, what ends in an error on every rank, and windows that are not finite."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import toy
import worker
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import bucketmoo_ds

LANGUAGES = ("de", "fr", "pl", "ko")
SEED = 13


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


def config(**changes: Any) -> bucketmoo_ds.BucketMOOConfig:
    return bucketmoo_ds.BucketMOOConfig(**{"languages": LANGUAGES} | changes)


def shard(model: nn.Module, **settings: Any) -> Any:
    for layer in model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def two_dimensional(replicas: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, worker.WORLD_SIZE // replicas), mesh_dim_names=("replicate", "shard"))


class Run:
    """A toy model under FSDP2, and what is needed to train it. Rank r's micro-batches are of language r, r + 1 and so
    on in a window; of language r only, where it must not change."""

    def __init__(
        self,
        *,
        module: nn.Module | None = None,
        replicas: int = 1,
        moo: dict[str, Any] | None = None,
        optimizer: Any = torch.optim.SGD,
        seed: int = SEED,
        **register: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        settings = {"mesh": two_dimensional(replicas)} if replicas > 1 else {}
        self.model = shard(module or toy.ToyLM(), **settings)
        self.micro_steps = register.get("micro_steps", 1)
        self.stride = 0 if register.get("once_a_window") else 1
        self.session = bucketmoo_ds.fsdp2.register(self.model, config(**(moo or {})), **register)
        self.optimizer = optimizer(self.model.parameters(), lr=0.05)

    def loss(self, language: int, window: int = 0, **batch: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1000 * window + 10 * language + worker.RANK)
        batch = toy.micro_batch(language, generator, ragged=True) | batch
        return self.model(**batch, language=LANGUAGES[language]) / self.micro_steps

    def micro_step(self, window: int = 0, step: int = 0, **batch: Any) -> None:
        self.loss((worker.RANK + self.stride * step) % len(LANGUAGES), window, **batch).backward()

    def window(self, window: int = 0) -> None:
        for step in range(self.micro_steps):
            self.micro_step(window, step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def state(self) -> list[Tensor]:
        """This rank's parts of parameters, and what the optimizer keeps of them."""
        tensors = []
        for parameter in self.model.parameters():
            kept = self.optimizer.state[parameter]
            tensors += [parameter, *(kept[name] for name in sorted(kept))]
        return [getattr(tensor.detach(), "_local_tensor", tensor).reshape(-1) for tensor in tensors]


# --- refused at start-up ------------------------------------------------------------------------------------------


def refused(case: str) -> None:
    bucketmoo_ds.fsdp2.register(*REFUSED[case]())


def _not_sharded() -> Any:
    model = toy.ToyLM()
    fully_shard(model.layers[0])
    return model, config()


def _several_groups() -> Any:
    """The head's parameters on a mesh of their own."""
    model = toy.ToyLM()
    head, alone = model.head.weight, FSDPMeshInfo(mesh=two_dimensional(worker.WORLD_SIZE)["shard"], shard_mesh_dim=0)

    def placement(each: Any) -> Any:
        return ShardPlacementResult(Shard(0), alone) if each is head else None

    return fully_shard(model, shard_placement_fn=placement), config()


class _Custom(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *arguments: Any, **named: Any) -> None:
        raise AssertionError


def _custom_reduce_scatter() -> Any:
    model = shard(toy.ToyLM())
    model.layers[1].set_custom_reduce_scatter(_Custom())
    return model, config()


def _own_memory() -> Any:
    """Of the kind of SymmMem, which needs GPUs."""
    model = shard(toy.ToyLM())
    model.set_allocate_memory_from_process_group_for_comm(True)
    return model, config()


def _all_reduce_hook() -> Any:
    model = shard(toy.ToyLM())
    model.layers[0].set_all_reduce_hook(lambda gradient: None)
    return model, config()


def _optimizer_in_backward() -> Any:
    model = shard(toy.ToyLM())
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model, config()


def _ignored() -> Any:
    model = toy.ToyLM()
    return fully_shard(model, ignored_params={model.head.weight}), config()


def _added_later() -> Any:
    model = shard(toy.ToyLM())
    model.adapters.append(nn.Linear(13, 13))
    return model, config()


def _nothing_to_train() -> Any:
    return shard(toy.ToyLM().requires_grad_(False)), config()


def _tensor_parallel() -> Any:
    model = toy.ToyLM()
    mesh = init_device_mesh("cpu", (1, worker.WORLD_SIZE), mesh_dim_names=("data", "tensor"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], {"0": ColwiseParallel(), "2": ColwiseParallel()})
        layer[3].requires_grad_(False)
    model.embed.requires_grad_(False)
    model.head.requires_grad_(False)
    return shard(model, mesh=mesh["data"]), config()


def _tensor_parallel_in_part() -> Any:
    model = toy.ToyLM()
    mesh = init_device_mesh("cpu", (1, worker.WORLD_SIZE), mesh_dim_names=("data", "tensor"))
    parallelize_module(model.layers[0], mesh["tensor"], {"0": ColwiseParallel()})
    return shard(model, mesh=mesh["data"]), config()


def _three_dimensions() -> Any:
    module = nn.Linear(4, 4, bias=False)
    names = ("replicate", "shard", "tensor")
    mesh = init_device_mesh("cpu", (1, 1, worker.WORLD_SIZE), mesh_dim_names=names)
    parallelize_module(module, mesh["tensor"], ColwiseParallel())
    return fully_shard(module, mesh=mesh["replicate", "shard"]), config()


def _several_meshes() -> Any:
    model = toy.ToyLM()
    fully_shard(model.layers[0], mesh=two_dimensional(1))
    return fully_shard(model), config()


def _replicas_without_shards() -> Any:
    return shard(toy.ToyLM(), mesh=two_dimensional(worker.WORLD_SIZE)), config()


def _replicated() -> Any:
    model = toy.ToyLM()
    replicate(model)
    return model, config()


def _permuted() -> Any:
    return shard(toy.ToyLM(), mesh=DeviceMesh("cpu", list(range(worker.WORLD_SIZE))[::-1])), config()


def _twice() -> Any:
    model = shard(toy.ToyLM())
    bucketmoo_ds.fsdp2.register(model, config())
    return model, config()


def _two_stages_on_one_node() -> Any:
    return shard(toy.ToyLM()), config(exchange="two_stage")


def _streaming_over_layers() -> Any:
    return shard(toy.ToyLM()), config(granularity="model", mode="streaming")


REFUSED: dict[str, Callable[[], Any]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _not_sharded,
        _several_groups,
        _custom_reduce_scatter,
        _own_memory,
        _all_reduce_hook,
        _optimizer_in_backward,
        _ignored,
        _added_later,
        _nothing_to_train,
        _tensor_parallel,
        _tensor_parallel_in_part,
        _three_dimensions,
        _several_meshes,
        _replicas_without_shards,
        _replicated,
        _permuted,
        _twice,
        _two_stages_on_one_node,
        _streaming_over_layers,
    )
}

# --- errors on every rank -----------------------------------------------------------------------------------------


def ranks_differ(what: str) -> None:
    """The last rank is given something else at register."""
    odd = worker.RANK == worker.WORLD_SIZE - 1
    model, settings, register = toy.ToyLM(), {}, {}
    if what == "model" and odd:
        model = toy.ToyLM(adapters=1)
    if what == "frozen" and odd:
        model.layers[1].requires_grad_(False)
    if what == "languages" and odd:
        settings = {"languages": LANGUAGES[::-1]}
    if what == "aggregator" and odd:
        settings = {"aggregator": "mean"}
    if what == "micro_steps":
        register = {"micro_steps": 3 if odd else 2}
    if what == "once_a_window":
        register = {"micro_steps": 2, "once_a_window": odd}
    model = fully_shard(model) if what == "wrapping" and odd else shard(model)
    bucketmoo_ds.fsdp2.register(model, config(**settings), **register)


def sync_off(ranks: list[int]) -> None:
    run = Run(micro_steps=2)
    run.micro_step()
    run.model.set_requires_gradient_sync(worker.RANK not in ranks)
    run.micro_step()


def changed_language() -> None:
    run = Run(micro_steps=2, once_a_window=True)
    for language in (0, 1):
        run.loss(language).backward()


def wrong_language(rank: int) -> None:
    run = Run()
    run.window()
    batch = toy.micro_batch(0, torch.Generator())
    run.model(**batch, language="es" if rank == worker.RANK else "de").backward()


def no_token_at_all() -> None:
    run = Run()
    run.micro_step(labels=torch.full((toy.SEQUENCES, toy.LENGTH), -100))


def changed_layout(what: str, ranks: list[int]) -> None:
    """After the first micro-step of a window, before the second."""
    model = toy.ToyLM(adapters=1)
    model.layers[1].requires_grad_(False)
    run = Run(module=model, micro_steps=2)
    run.micro_step()
    if worker.RANK in ranks:
        if what == "unfrozen":
            model.layers[1].requires_grad_(True)
        elif what == "frozen":
            model.layers[0].requires_grad_(False)
        elif what == "frozen in part":
            model.layers[0][0].bias.requires_grad_(False)
        elif what == "added":
            model.adapters.append(nn.Linear(13, 13))
        elif what == "hook":
            model.layers[0][0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
        elif what == "reduce-scatter":
            model.layers[0].set_custom_reduce_scatter(_Custom())
    run.micro_step()


def unused_left_out() -> None:
    """Gradients that FSDP2 then leaves out of a bucket would move all that come after them."""
    run = Run(module=toy.ToyLM(adapters=1))
    run.model.set_reduce_scatter_unused_params(False)
    run.micro_step()


class CalledTwice(toy.ToyLM):
    def logits(self, input_ids: Tensor, adapter: int | None = None) -> Tensor:
        return super().logits(input_ids, adapter) + self.head(self.layers[2](self.embed(input_ids)))


def called_twice() -> None:
    Run(module=CalledTwice()).micro_step()


def behind_the_outputs() -> None:
    """The model hides its loss, and is trained by what it left elsewhere."""
    run = Run()
    run.window()
    kept: list[Tensor] = []
    run.model.head.register_forward_hook(lambda module, args, output: kept.append(output))
    run.loss(0)
    kept[0].sum().backward()


def closed() -> None:
    run = Run()
    run.window()
    run.session.close()
    run.model(**toy.micro_batch(0, torch.Generator())).backward()


def not_the_root() -> None:
    """Of a model of which another module is the root."""
    model = nn.Sequential(shard(toy.ToyLM()))
    bucketmoo_ds.fsdp2.register(model[0], config())
    fully_shard(model)
    batch = toy.micro_batch(0, torch.Generator())
    model({**batch, "language": "de"}).backward()


def step_within_a_window() -> None:
    run = Run(micro_steps=2)
    run.micro_step()
    run.optimizer.step()


def backward_after_the_boundary() -> None:
    run = Run()
    run.micro_step()
    run.micro_step()


def state_within_a_window() -> None:
    run = Run(micro_steps=2)
    run.micro_step()
    run.session.state_dict()


def mixed_nodes(once_a_window: bool) -> None:
    run = Run(moo={"exchange": "two_stage", "ranks_per_node": 2}, micro_steps=2, once_a_window=once_a_window)
    run.micro_step()


# --- what goes on -------------------------------------------------------------------------------------------------


def not_finite(
    *, micro_steps: int, value: float, where: str | None, on_nonfinite: str, replicas: int = 1, **moo: Any
) -> dict[str, Any]:
    """In the second of four windows, the gradients of "fr" hold `value`: all of them, or one parameter's."""
    run = Run(
        micro_steps=micro_steps, on_nonfinite=on_nonfinite, optimizer=torch.optim.AdamW, replicas=replicas, moo=moo
    )
    run.window()
    before = worker.checksum(run.state)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("bucketmoo_ds").addHandler(handler)
    for step in range(micro_steps):
        language = (worker.RANK + step) % len(LANGUAGES)
        poisoned = LANGUAGES[language] == "fr"
        handle = _poison(run.model, where, value) if poisoned and where else None
        (run.loss(language, 1) * (value if poisoned and not where else 1.0)).backward()
        if handle:
            handle.remove()
    logging.getLogger("bucketmoo_ds").removeHandler(handler)
    gradients = [parameter.grad for parameter in run.model.parameters()]
    found = {
        "skipped": run.session.skipped,
        "nonfinite": run.session.last.nonfinite,
        "dropped": all(gradient is None for gradient in gradients),
        "nan": all(gradient is not None and bool(gradient.to_local().isnan().all()) for gradient in gradients),
        "norm": float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)),
        "log": logged.getvalue(),
        "buckets": [bucket.name for bucket in run.session.moo.plan.buckets],
    }
    if on_nonfinite == "drop":
        run.optimizer.step()
        found["unchanged"] = worker.checksum(run.state) == before
    run.optimizer.zero_grad()
    for window in (2, 3):
        run.window(window)
    return found | {
        "goes_on": worker.checksum(run.state) != before,
        "finite": all(bool(each.isfinite().all()) for each in run.state),
        "skipped_later": run.session.skipped,
        "counters": dict(run.session.moo.counters),
        "weights": worker.checksum([run.session.last.weights]),
    }


def _poison(model: nn.Module, where: str, value: float) -> Any:
    """Makes the gradient of one layer's output `value`, and so those of the layers before it."""
    layer = model.get_submodule(where)

    def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: torch.full_like(gradient, value))

    return layer.register_forward_hook(spoil)


def resumed(*, seed: int, replicas: int = 1, forget: bool = False, **arguments: Any) -> dict[str, str]:
    """Trains four windows; and two, which are saved, and the other two in a new model. PCGrad's orders are drawn.

    Args:
        forget: whether our part of what was saved is left out.
    """
    how = {"seed": seed, "replicas": replicas, "optimizer": torch.optim.AdamW, "moo": {"aggregator": "pcgrad"}}
    whole = Run(**how | arguments)
    for window in range(4):
        whole.window(window)
    first = Run(**how | arguments)
    for window in range(2):
        first.window(window)
    saved = first.model.state_dict(), first.optimizer.state_dict(), first.session.state_dict()
    second = Run(**how | arguments)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.to_local().fill_(float("nan"))
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    if not forget:
        second.session.load_state_dict(saved[2])
    for window in (2, 3):
        second.window(window)
    return {"whole": worker.checksum(whole.state), "resumed": worker.checksum(second.state)}


def unlike_nodes(sizes: list[int]) -> dict[str, Any]:
    """Ranks whose LOCAL_WORLD_SIZE differs, as on nodes of different sizes."""
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[worker.RANK])
    try:
        run = Run()
        run.window()
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = str(worker.WORLD_SIZE)
    return {"nodes": run.session.moo.exchange.nodes, "sent": sorted(run.session.moo.exchange.sent_bytes)}


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        refused,
        ranks_differ,
        sync_off,
        changed_language,
        wrong_language,
        no_token_at_all,
        changed_layout,
        unused_left_out,
        called_twice,
        behind_the_outputs,
        closed,
        not_the_root,
        step_within_a_window,
        backward_after_the_boundary,
        state_within_a_window,
        mixed_nodes,
        not_finite,
        resumed,
        unlike_nodes,
    )
}

if __name__ == "__main__":
    worker.serve(run)
