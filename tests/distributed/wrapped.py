"""Worker: trains a toy model under one of torch's own wrappers and compares its gradients with the reference.

The reference is `bucketmoo_ds.reference`: one process, float64, fed with the gradients that autograd gave every rank.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import toy
import toy_models
import worker
from compare_with_reference import blocks_of, random_order_seed, ratio
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.adapters import table
from bucketmoo_ds.pipeline import engine
from bucketmoo_ds.plan.choices import create_aggregator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEARNING_RATE = 0.05
WINDOWS = 2
engine.TOGETHER = 1000  # elements: some of the toy model's buckets wait for each other, others do not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training run: the wrapper's settings, ours, and the data's.

    Args:
        wrapper: `fsdp1`, `fsdp2`, `hsdp` (FSDP2 with `replicas`), `ddp`, `single` (one process without a wrapper), or
            any other name of `bucketmoo_ds.adapters.table` that has a `wrap`.
        table: the languages of the slots, `[M][W]`, of every window; left out, as many as there are slots.
        dtype: in which the model computes and gradients travel; parameters are float32, under DDP and alone of `dtype`.
        strategy, orig_params: FSDP1's `sharding_strategy` and `use_orig_params`.
        bucket_size: elements of a bucket, under DDP and alone.
        bucket_view, find_unused, static_graph: DDP's `gradient_as_bucket_view` and so on.
        used_adapters: which of the model's `adapters` each rank's forward passes use.
        no_sync: whether all micro-steps but the last run under DDP's `no_sync()`.
        checkpoint: `none`, `reentrant`, `no_reentrant`.
        compile: the backend of `torch.compile`, or nothing.
        model: a key of `MODELS`.
        shard: what only FSDP1 or FSDP2 knows, see `wrap_fsdp1` and `wrap_fsdp2`.
    """

    seed: int
    wrapper: str = "fsdp2"
    model: str = "toy"
    shard: dict[str, Any] = dataclasses.field(default_factory=dict)
    micro_steps: int = 1
    languages: int = 2
    table: list[list[int]] | None = None
    dtype: str = "fp32"
    replicas: int = 1
    once_a_window: bool = False
    reshard: bool = True
    offload: bool = False
    checkpoint: str = "none"
    compile: str = ""
    strategy: str = "FULL_SHARD"
    orig_params: bool = True
    bucket_size: int = 700
    bucket_view: bool = False
    find_unused: bool = False
    static_graph: bool = False
    used_adapters: list[int] | None = None
    no_sync: bool = False
    aggregator: str = "mgda"
    granularity: str = "bucket"
    weighting: str = "language"
    normalize: str = "none"
    mode: str = "auto"
    exchange: str = "auto"
    ranks_per_node: int = 0
    row_storage: str = "float32"
    ragged: bool = True
    empty: bool = False
    tied: bool = False
    frozen: bool = False
    adapters: int = 0
    clip: float = 0.0

    @property
    def config(self) -> bucketmoo_ds.BucketMOOConfig:
        return bucketmoo_ds.BucketMOOConfig(
            languages=[f"l{index}" for index in range(self.languages)],
            aggregator=self.aggregator,
            granularity=self.granularity,
            weighting=self.weighting,
            normalize=self.normalize,
            mode=self.mode,
            exchange=self.exchange,
            ranks_per_node=self.ranks_per_node,
            row_storage=self.row_storage,
            seed=self.seed,
        )

    def languages_of(self, window: int) -> list[list[int]]:
        if self.table is not None:
            return self.table
        generator = torch.Generator().manual_seed(self.seed + window)
        rows = 1 if self.once_a_window else self.micro_steps
        slots = [(2 * window + slot) % self.languages for slot in range(rows * worker.WORLD_SIZE)]
        places = torch.randperm(len(slots), generator=generator).tolist()
        starts = range(0, len(slots), worker.WORLD_SIZE)
        return [[slots[place] for place in places[at : at + worker.WORLD_SIZE]] for at in starts] * (
            self.micro_steps // rows
        )


def run(**fields: Any) -> dict[str, Any]:
    """Trains a case.

    Returns:
        the largest errors (see `compare_window` of compare_with_reference.py), hashes of this rank's parameters, of all
        parameters and of all weights, bytes, and what the session says of itself.
    """
    case = Case(**fields)
    torch.manual_seed(case.seed)
    model = MODELS[case.model](tied=case.tied, frozen=case.frozen, adapters=case.adapters)
    twin = copy.deepcopy(model)
    wrapped, session = wrap(case, model)
    optimizer = torch.optim.SGD([each for each in wrapped.parameters() if each.requires_grad], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(case.seed * 100 + worker.RANK)
    errors: list[dict[str, float]] = []
    decided: list[Tensor] = []
    for window in range(WINDOWS):
        load_whole(twin, wrapped)
        micro_gradients = []
        for step, row in enumerate(case.languages_of(window)):
            language = row[worker.RANK]
            empty = case.empty and (step, worker.RANK) == (case.micro_steps - 1, 0)
            batch = toy.micro_batch(language, generator, ragged=case.ragged, empty=empty)
            if case.used_adapters:
                batch["adapter"] = case.used_adapters[worker.RANK]
            micro_gradients.append(own_gradient(twin, case, batch, language))
            unreduced = case.no_sync and step < case.micro_steps - 1
            with wrapped.no_sync() if unreduced else contextlib.nullcontext():
                (loss_in(wrapped(**batch, language=f"l{language}")) / case.micro_steps).backward()
        if case.clip:
            if isinstance(wrapped, FullyShardedDataParallel):
                wrapped.clip_grad_norm_(case.clip)
            else:
                torch.nn.utils.clip_grad_norm_(wrapped.parameters(), case.clip)
        errors.append(compare(case, session, wrapped, window, micro_gradients))
        decided.append(session.last.weights)
        optimizer.step()
        optimizer.zero_grad()
    return {name: max(error[name] for error in errors) for name in errors[0]} | {
        "parameters": worker.checksum(weights_of(wrapped)),
        "decided": worker.checksum(decided),
        "streaming": session.moo.streaming,
        "sent": dict(session.moo.exchange.sent_bytes),
        "between_nodes": dict(session.moo.exchange.sent_between_nodes),
        "counters": dict(session.moo.counters),
        "row_bytes": session.moo.row_bytes,
    }


def wrap(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    return WRAPPERS.get(case.wrapper, wrap_plainly)(case, toy_models.with_checkpoints(model, case.checkpoint))


def wrap_plainly(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    """As the table of frameworks says: a framework that nothing is known of here."""
    framework = table.find(case.wrapper)
    assert framework.wrap is not None
    wrapped = framework.wrap(model, model.layers, DTYPES[case.dtype], case.bucket_size * DTYPES[case.dtype].itemsize)
    once = {"once_a_window": True} if case.once_a_window else {}
    return wrapped, framework.load().register(wrapped, case.config, micro_steps=case.micro_steps, **once)


def wrap_fsdp2(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    """The fields of `case.shard`: `reduce_dtype`, and `output_dtype` of the root, of the mixed precision; `by_column`,
    whether matrices are sharded so where the ranks divide their columns; `together`, whether the first two layers are
    one group; `apart`, whether every adapter is one; `mesh_2d`, whether one replica lies on a mesh of two dimensions;
    `bf16_parameters`; `evaluate`, whether there is a forward pass before register, and `assign`, whether parameters are
    replaced after it."""
    settings: dict[str, Any] = {"reshard_after_forward": case.reshard}
    options = dict(case.shard)
    if options.pop("bf16_parameters", False):
        model = model.to(torch.bfloat16)
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if case.dtype == "bf16" else None, reduce_dtype=options.pop("reduce_dtype", None)
    )
    settings["mp_policy"] = precision
    if case.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.replicas > 1 or options.pop("mesh_2d", False):
        shape = (case.replicas, worker.WORLD_SIZE // case.replicas)
        settings["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    if options.pop("by_column", False):
        settings["shard_placement_fn"] = by_column
    together = list(model.layers[:2]) if options.pop("together", False) else []
    if together:
        fully_shard(together, **settings)
    apart = model.adapters if options.pop("apart", False) else []
    for module in (*model.layers, *apart):
        if module not in together:
            fully_shard(module, **settings)
    settings["mp_policy"] = dataclasses.replace(precision, output_dtype=options.pop("output_dtype", None))
    fully_shard(model, **settings)
    if options.pop("evaluate", False):
        with torch.no_grad():
            model(**toy.micro_batch(0, torch.Generator()))
    session = bucketmoo_ds.fsdp2.register(
        model, case.config, micro_steps=case.micro_steps, once_a_window=case.once_a_window
    )
    if options.pop("assign", False):
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert not options, options
    return (torch.compile(model, backend=case.compile) if case.compile else model), session


def by_column(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() > 1 and parameter.size(1) % worker.WORLD_SIZE == 0 else None


def wrap_ddp(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    cap = case.bucket_size * DTYPES[case.dtype].itemsize / 2**20
    ddp = DistributedDataParallel(
        model.to(torch.bfloat16) if case.dtype == "bf16" else model,
        bucket_cap_mb=None if case.compile else cap,  # torch.compile knows no cap below 1 MiB
        gradient_as_bucket_view=case.bucket_view,
        find_unused_parameters=case.find_unused,
        static_graph=case.static_graph,
    )
    session = bucketmoo_ds.ddp.register(
        ddp,
        case.config,
        micro_steps=case.micro_steps,
        once_a_window=case.once_a_window,
    )
    return (torch.compile(ddp, backend=case.compile) if case.compile else ddp), session


def wrap_single(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    model = model.to(torch.bfloat16) if case.dtype == "bf16" else model
    session = bucketmoo_ds.single.register(
        model, case.config, micro_steps=case.micro_steps, bucket_size=case.bucket_size
    )
    return (torch.compile(model, backend=case.compile) if case.compile else model), session


def wrap_fsdp1(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    """The fields of `case.shard`: `reduce_dtype` and `keep_low_precision_grads` of the mixed precision; `together`,
    whether the root is the only unit; `whole`, how many layers are NO_SHARD whatever the others are."""
    options = dict(case.shard)
    settings: dict[str, Any] = {
        "sharding_strategy": ShardingStrategy[case.strategy],
        "use_orig_params": case.orig_params,
        "device_id": torch.device("cpu"),
        "cpu_offload": CPUOffload(case.offload),
    }
    if case.dtype == "bf16":
        settings["mixed_precision"] = MixedPrecision(
            param_dtype=torch.bfloat16,
            reduce_dtype=options.pop("reduce_dtype", torch.bfloat16),
            keep_low_precision_grads=options.pop("keep_low_precision_grads", False),
        )
    if case.offload:  # FSDP1 pins memory and waits for a stream, for which it takes a GPU to be there
        torch.Tensor.pin_memory = lambda tensor: tensor
        torch.cpu.Stream.synchronize = lambda stream: None
    together, number_whole = options.pop("together", False), options.pop("whole", 0)
    for index, layer in enumerate(() if together else model.layers):
        different = {"sharding_strategy": ShardingStrategy.NO_SHARD} if index < number_whole else {}
        model.layers[index] = FullyShardedDataParallel(layer, **settings | different)
    wrapped = FullyShardedDataParallel(model, **settings)
    session = bucketmoo_ds.fsdp1.register(
        wrapped, case.config, micro_steps=case.micro_steps, once_a_window=case.once_a_window
    )
    assert not options, options
    return wrapped, session


MODELS: dict[str, Callable[..., nn.Module]] = {
    "toy": toy.ToyLM,
    "dict": functools.partial(toy_models.WithLogits, "dict"),
    "dataclass": functools.partial(toy_models.WithLogits, "dataclass"),
    "flat": toy_models.Flat,
    "lora": functools.partial(toy_models.LoRA, worker.WORLD_SIZE),
}
WRAPPERS = {"fsdp1": wrap_fsdp1, "fsdp2": wrap_fsdp2, "hsdp": wrap_fsdp2, "ddp": wrap_ddp, "single": wrap_single}


def loss_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output.loss


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors of sharded ones. The ranks tell each other of all at once: `DTensor.full_tensor` takes long."""
    shards = {name: each.detach().to_local() for name, each in tensors.items() if isinstance(each, DTensor)}
    everyone: list[Any] = [None] * worker.WORLD_SIZE
    dist.all_gather_object(everyone, shards)

    def cat(name: str, tensor: DTensor) -> Tensor:
        replicas = tensor.device_mesh.mesh.reshape(-1, tensor.device_mesh.size(-1)).tolist()
        ranks = next(ranks for ranks in replicas if worker.RANK in ranks)
        return torch.cat([everyone[rank][name] for rank in ranks], dim=tensor.placements[-1].dim)

    return {name: cat(name, each) if name in shards else each.detach() for name, each in tensors.items()}


def weights_of(wrapped: nn.Module) -> list[Tensor]:
    if not isinstance(wrapped, FullyShardedDataParallel):
        return list(whole(dict(wrapped.named_parameters())).values())
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        return [each.detach().clone() for each in wrapped.parameters()]


def plain_name(name: str) -> str:
    for part in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module."):
        name = name.replace(part, "")
    return name


def load_whole(twin: nn.Module, wrapped: nn.Module) -> None:
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            weights = {plain_name(name): value.detach().clone() for name, value in wrapped.named_parameters()}
        twin.load_state_dict(weights, strict=False)  # the head may be the embedding
        return
    twin.load_state_dict({plain_name(name): value for name, value in whole(wrapped.state_dict()).items()})


def own_gradient(twin: nn.Module, case: Case, batch: dict[str, Tensor], language: int) -> reference.MicroGradient:
    """The gradient that the wrapper is handed for this micro-batch, before anything is reduced."""
    model = copy.deepcopy(twin).to(torch.bfloat16) if case.dtype == "bf16" else twin
    model.zero_grad()
    loss = loss_in(model(**batch))
    (loss / case.micro_steps).backward()
    gradient = {
        name: (torch.zeros_like(each) if each.grad is None else each.grad.clone()).double()
        for name, each in model.named_parameters()
        if each.requires_grad
    }
    return reference.MicroGradient(language, toy.tokens_of(batch), gradient, float(loss.detach()))


def gradients(wrapped: nn.Module) -> dict[str, Tensor]:
    trained = {plain_name(name): each for name, each in wrapped.named_parameters() if each.requires_grad}
    found = {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in trained.items()}
    return {name: each.double() for name, each in whole(found).items()}


def fsdp1_gradients(wrapped: nn.Module) -> dict[str, Tensor]:
    """Puts together what the optimizers of all ranks are given: pieces of parameters, or of flat parameters."""
    pieces: dict[str, tuple[int, Tensor]] = {}
    shapes = {}
    for name, module in wrapped.named_modules():
        flat = getattr(module, "_flat_param", None)
        if not isinstance(module, FullyShardedDataParallel) or flat is None:
            continue
        for place, (own_name, shape) in enumerate(zip(flat._fqns, flat._shapes, strict=True)):
            label = plain_name(f"{name}.{own_name}").removeprefix(".")
            shapes[label] = shape
            info = flat._shard_param_infos[place]
            gradient = flat.grad if flat._params is None else flat._params[place].grad
            if not info.in_shard or gradient is None:
                continue
            if flat._params is None:
                gradient = gradient[info.offset_in_shard :][: info.numel_in_shard]
            pieces[label] = (info.intra_param_start_idx, gradient.detach().double().flatten())
    everyone: list[Any] = [None] * worker.WORLD_SIZE
    dist.all_gather_object(everyone, pieces)
    found = {name: torch.zeros(shape.numel(), dtype=torch.float64) for name, shape in shapes.items()}
    for each in everyone:
        for name, (start, piece) in each.items():
            found[name][start : start + piece.numel()] = piece
    return {name: found[name].view(shape) for name, shape in shapes.items()}


def compare(
    case: Case, session: Any, wrapped: nn.Module, window: int, micro_gradients: list[reference.MicroGradient]
) -> dict[str, float]:
    everyone: list[Any] = [None] * worker.WORLD_SIZE
    dist.all_gather_object(everyone, micro_gradients)
    plan, last = session.moo.plan, session.last
    blocks = {block: [plain_name(name) for name in names] for block, names in blocks_of(plan).items()}
    expected, weights = reference.resolve_window(
        [micro for rank in everyone for micro in rank],
        blocks,
        micro_steps=case.micro_steps,
        aggregator=create_aggregator(session.moo.config),
        weighting=case.weighting,
        normalize=case.normalize,
        seed=random_order_seed(case.seed, window),
    )
    found = fsdp1_gradients(wrapped) if case.wrapper == "fsdp1" else gradients(wrapped)
    if case.clip:
        norm = float(torch.cat([value.flatten() for value in expected.values()]).norm())
        factor = min(case.clip / (norm + 1e-6), 1.0)  # torch.nn.utils.clip_grad_norm_
        found = {name: value / factor for name, value in found.items()}
    errors = {"gradient": 0.0, "weights": 0.0}
    for number, (block, names) in enumerate(blocks.items()):
        difference = torch.cat([(found[name] - expected[name].view_as(found[name])).flatten() for name in names])
        diagonal = last.gram[number].diagonal()[list(last.present)]
        scale = float((weights[block].abs() * diagonal.sqrt()).sum())
        ours = last.weights[number, list(last.present)]
        errors["gradient"] = max(errors["gradient"], ratio(float(difference.norm()), scale))
        errors["weights"] = max(errors["weights"], float((ours - weights[block]).abs().max()))
    return errors


if __name__ == "__main__":
    worker.serve(run)
