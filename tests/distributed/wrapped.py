"""Worker: trains a toy model under one of torch's own wrappers and compares its gradients with the reference.

The reference is `bucketmoo_ds.reference`: one process, float64, fed with the gradients that autograd gave every rank.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker
from compare_with_reference import blocks_of, random_order_seed, ratio
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.choices import create_aggregator

LEARNING_RATE = 0.05
WINDOWS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training run: the wrapper's settings, ours, and the data's.

    Args:
        wrapper: `fsdp2`, or `hsdp` (FSDP2 with `replicas`).
        table: the languages of the slots, `[M][W]`, of every window; left out, as many as there are slots.
        dtype: in which the model computes and gradients travel; parameters are float32.
        checkpoint: `none`, `reentrant`, `no_reentrant`.
    """

    seed: int
    wrapper: str = "fsdp2"
    micro_steps: int = 1
    languages: int = 2
    table: list[list[int]] | None = None
    dtype: str = "fp32"
    replicas: int = 1
    once_a_window: bool = False
    reshard: bool = True
    offload: bool = False
    checkpoint: str = "none"
    compile: bool = False
    aggregator: str = "mgda"
    granularity: str = "bucket"
    weighting: str = "language"
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
    model = toy.ToyLM(tied=case.tied, frozen=case.frozen, adapters=case.adapters)
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
            micro_gradients.append(own_gradient(twin, case, batch, language))
            (wrapped(**batch, language=f"l{language}") / case.micro_steps).backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), case.clip)
        errors.append(compare(case, session, wrapped, window, micro_gradients))
        decided.append(session.last.weights)
        optimizer.step()
        optimizer.zero_grad()
    return {name: max(error[name] for error in errors) for name in errors[0]} | {
        "parameters": worker.checksum(whole(each) for each in wrapped.parameters()),
        "decided": worker.checksum(decided),
        "streaming": session.moo.streaming,
        "sent": dict(session.moo.exchange.sent_bytes),
        "between_nodes": dict(session.moo.exchange.sent_between_nodes),
        "counters": dict(session.moo.counters),
    }


def wrap(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    if case.checkpoint != "none":
        implementation = getattr(CheckpointImpl, case.checkpoint.upper())
        for index, layer in enumerate(model.layers):
            model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=implementation)
    return WRAPPERS[case.wrapper](case, model)


def wrap_fsdp2(case: Case, model: nn.Module) -> tuple[nn.Module, Any]:
    settings: dict[str, Any] = {"reshard_after_forward": case.reshard}
    if case.dtype == "bf16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if case.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.replicas > 1:
        shape = (case.replicas, worker.WORLD_SIZE // case.replicas)
        settings["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for layer in model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    session = bucketmoo_ds.fsdp2.register(
        model, case.config, micro_steps=case.micro_steps, once_a_window=case.once_a_window
    )
    return (torch.compile(model) if case.compile else model), session


WRAPPERS = {"fsdp2": wrap_fsdp2, "hsdp": wrap_fsdp2}


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain_name(name: str) -> str:
    for part in ("_orig_mod.", "_checkpoint_wrapped_module.", "module."):
        name = name.replace(part, "")
    return name


def load_whole(twin: nn.Module, wrapped: nn.Module) -> None:
    twin.load_state_dict({plain_name(name): whole(value) for name, value in wrapped.state_dict().items()})


def own_gradient(twin: nn.Module, case: Case, batch: dict[str, Tensor], language: int) -> reference.MicroGradient:
    """The gradient that the wrapper is handed for this micro-batch, before anything is reduced."""
    model = copy.deepcopy(twin).to(torch.bfloat16) if case.dtype == "bf16" else twin
    model.zero_grad()
    (model(**batch) / case.micro_steps).backward()
    gradient = {
        name: (torch.zeros_like(each) if each.grad is None else each.grad.clone()).double()
        for name, each in model.named_parameters()
        if each.requires_grad
    }
    return reference.MicroGradient(language, toy.tokens_of(batch), gradient)


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
        seed=random_order_seed(case.seed, window),
    )
    found = {plain_name(name): whole(each.grad).double() for name, each in wrapped.named_parameters() if each.requires_grad}
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
