"""Worker: what FSDP1 refuses to start with, what ends in an error, and what must make no difference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms._comm_hooks.default_hooks import reduce_scatter_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import bucketmoo_ds

LANGUAGES = ("de", "fr")
SEED = 11


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


def config(**changes: Any) -> bucketmoo_ds.BucketMOOConfig:
    return bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, **changes)


def wrap(module: nn.Module, *, strategy: str = "FULL_SHARD", layers: bool = True, **fsdp: Any) -> nn.Module:
    """A unit for each layer, unless `layers` is off, and one for the rest."""
    settings = {
        "sharding_strategy": ShardingStrategy[strategy],
        "use_orig_params": True,
        "device_id": torch.device("cpu"),
    } | fsdp
    for index, layer in enumerate(getattr(module, "layers", ()) if layers else ()):
        module.layers[index] = FullyShardedDataParallel(layer, **settings)
    return FullyShardedDataParallel(module, **settings)


class Run:
    """A toy model under FSDP1, and what is needed to train it."""

    def __init__(
        self,
        *,
        module: Callable[[], nn.Module] = toy.ToyLM,
        fsdp: dict[str, Any] | None = None,
        moo: dict[str, Any] | None = None,
        optimizer: Any = torch.optim.SGD,
        **register: Any,
    ) -> None:
        torch.manual_seed(SEED)
        self.module = module()
        self.model = wrap(self.module, **(fsdp or {}))
        self.micro_steps = register.get("micro_steps", 1)
        self.session = bucketmoo_ds.fsdp1.register(self.model, config(**(moo or {})), **register)
        self.optimizer = optimizer(self.model.parameters(), lr=0.05)
        self.generator = torch.Generator().manual_seed(SEED + worker.RANK)

    def loss(self, language: int) -> Tensor:
        batch = toy.micro_batch(language, self.generator)
        return self.model(**batch, language=LANGUAGES[language]) / self.micro_steps

    def micro_step(self, factor: float = 1.0) -> None:
        (self.loss(worker.RANK % 2) * factor).backward()

    def backwards(self, factor: float = 1.0) -> None:
        """The micro-steps of a window."""
        for step in range(1, self.micro_steps + 1):
            local = self.session.moo.window.local and step < self.micro_steps
            with self.model.no_sync() if local else contextlib.nullcontext():
                self.micro_step(factor)

    def window(self) -> None:
        self.backwards()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> str:
        return worker.checksum(self.model.state_dict().values())


# --- refused at start-up ------------------------------------------------------------------------------------------


def refused(case: str) -> None:
    REFUSED[case]()


def _register(model: nn.Module) -> None:
    bucketmoo_ds.fsdp1.register(model, config())


def _no_fsdp() -> None:
    _register(toy.ToyLM())


def _fsdp2() -> None:
    _register(fully_shard(toy.ToyLM()))


def _hybrid() -> None:
    """One replica of two ranks."""
    _register(wrap(toy.ToyLM(), strategy="HYBRID_SHARD", device_mesh=init_device_mesh("cpu", (1, 2))))


def _hybrid_zero2() -> None:
    """Two replicas of one rank, which FSDP1 makes NO_SHARD."""
    _register(wrap(toy.ToyLM(), strategy="_HYBRID_SHARD_ZERO2", device_mesh=init_device_mesh("cpu", (2, 1))))


def _hooked() -> None:
    model = wrap(toy.ToyLM())
    model.register_comm_hook(None, reduce_scatter_hook)
    _register(model)


def _twice() -> None:
    model = wrap(toy.ToyLM())
    for _ in range(2):
        _register(model)


def _frozen() -> None:
    _register(wrap(toy.ToyLM().requires_grad_(False)))


def _groups() -> None:
    module = toy.ToyLM()
    other = dist.new_group([0, 1])
    module.layers[1] = FullyShardedDataParallel(
        module.layers[1], process_group=other, use_orig_params=True, device_id=torch.device("cpu")
    )
    _register(wrap(module, layers=False))


def _ignored() -> None:
    module = toy.ToyLM()
    _register(wrap(module, ignored_states=[module.head.weight]))


def _ignored_flat() -> None:
    module = toy.ToyLM()
    _register(wrap(module, ignored_states=[module.head.weight], use_orig_params=False))


def _added() -> None:
    """An adapter that is added after wrapping."""
    module = toy.ToyLM()
    model = wrap(module)
    module.head.down = nn.Parameter(torch.ones(2, 13))
    _register(model)


def _tied() -> None:
    module = toy.ToyLM(tied=True)
    module.head = wrap(module.head)
    _register(wrap(module))


def _optimizer_in_backward() -> None:
    module = toy.ToyLM()
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    _register(wrap(module))


def _post_accumulate() -> None:
    module = toy.ToyLM()
    module.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    _register(wrap(module))


def _post_accumulate_flat() -> None:
    model = wrap(toy.ToyLM(), use_orig_params=False)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    _register(model)


def _tensor_parallel() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel()})
    _register(wrap(module, device_mesh=mesh["data"]))


def _other_torch() -> None:
    """A torch that keeps the layout of flat parameters elsewhere."""
    model = wrap(toy.ToyLM())
    del model._handle.flat_param._is_padding_mask
    _register(model)


REFUSED: dict[str, Callable[[], None]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _no_fsdp,
        _fsdp2,
        _hybrid,
        _hybrid_zero2,
        _hooked,
        _twice,
        _frozen,
        _groups,
        _ignored,
        _ignored_flat,
        _added,
        _tied,
        _optimizer_in_backward,
        _post_accumulate,
        _post_accumulate_flat,
        _tensor_parallel,
        _other_torch,
    )
}

# --- errors on every rank -----------------------------------------------------------------------------------------


def unsynced(ranks: Sequence[int], once_a_window: bool = False) -> None:
    """These ranks run a micro-step under `no_sync` that has to be exchanged."""
    run = Run(micro_steps=2, once_a_window=once_a_window)
    if once_a_window:
        with run.model.no_sync():
            run.micro_step()
    with run.model.no_sync() if worker.RANK in ranks else contextlib.nullcontext():
        run.micro_step()


def synced(rank: int) -> None:
    """This rank runs a micro-step without `no_sync` that must not be exchanged."""
    run = Run(micro_steps=2, once_a_window=True)
    with contextlib.nullcontext() if rank == worker.RANK else run.model.no_sync():
        run.micro_step()


def unregistered() -> None:
    model = wrap(toy.ToyLM())
    session, _ = bucketmoo_ds.fsdp1.comm_hook(model, config())
    with session.language("de"):
        model(**toy.micro_batch(0, torch.Generator().manual_seed(SEED))).backward()


def two_forwards(orig_params: bool) -> None:
    """FSDP1 reduces in the first backward only."""
    run = Run(micro_steps=2, fsdp={"strategy": "NO_SHARD", "use_orig_params": orig_params})
    first, second = run.loss(0), run.loss(0)
    with run.session.language("de"):
        first.backward()
        second.backward()


class Sometimes(nn.Module):
    """A unit of which a forward pass makes use, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, inputs: Tensor, layers: Sequence[int]) -> Tensor:
        for layer in layers:
            inputs = self.layers[layer](inputs).tanh()
        return inputs.square().mean()


def left_behind() -> None:
    """A unit that is used under `no_sync`, but not in the window's last micro-step."""
    run = Run(module=Sometimes, fsdp={"strategy": "NO_SHARD"}, micro_steps=2, once_a_window=True)
    inputs = torch.ones(3, 4)
    with run.model.no_sync():
        run.model(inputs, [0, 1], language="de").backward()
    run.model(inputs, [0], language="de").backward()


def unequal_units() -> None:
    """Ranks use other units, which a strategy that gathers parameters could not do at all."""
    run = Run(module=Sometimes, fsdp={"strategy": "NO_SHARD"})
    run.model(torch.ones(3, 4), [worker.RANK], language="de").backward()


class Recomputed(nn.Module):
    """Two reentrant checkpoints, whose gradients come one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.parts[0](inputs)
        for part in self.parts[1:]:
            hidden = checkpoint(part, hidden, use_reentrant=True)
        return hidden.square().mean()


def recomputed() -> None:
    run = Run(module=Recomputed, fsdp={"strategy": "NO_SHARD"})
    run.model(torch.ones(3, 4), language="de").backward()


def wrong_language(rank: int) -> None:
    run = Run()
    language = "es" if rank == worker.RANK else "de"
    run.model(**toy.micro_batch(0, run.generator), language=language).backward()


def changed_language() -> None:
    run = Run(micro_steps=2, once_a_window=True)
    for language, context in ((0, run.model.no_sync()), (1, contextlib.nullcontext())):
        with context:
            run.loss(language).backward()


def step_within_a_window(strategy: str, once_a_window: bool = False, **fsdp: Any) -> None:
    run = Run(fsdp={"strategy": strategy, **fsdp}, micro_steps=2, once_a_window=once_a_window)
    with run.model.no_sync() if once_a_window else contextlib.nullcontext():
        run.micro_step()
    run.optimizer.step()


def backward_after_the_boundary(**fsdp: Any) -> None:
    run = Run(fsdp=fsdp)
    run.micro_step()
    run.micro_step()


def closed() -> None:
    run = Run()
    run.session.close()
    run.model(**toy.micro_batch(0, run.generator)).backward()


def unfrozen() -> None:
    run = Run(module=lambda: toy.ToyLM(frozen=True))
    run.module.requires_grad_(True)
    run.micro_step()


# --- windows that are not finite ----------------------------------------------------------------------------------


def not_finite(mode: str, micro_steps: int, on_nonfinite: str, once_a_window: bool, **fsdp: Any) -> dict[str, Any]:
    """In the second of three windows, the gradients of "fr" (rank 1) are NaN."""
    run = Run(
        fsdp=fsdp,
        moo={"mode": mode},
        micro_steps=micro_steps,
        once_a_window=once_a_window,
        on_nonfinite=on_nonfinite,
        optimizer=torch.optim.Adam,
    )
    run.window()
    before = run.parameters
    run.backwards(math.nan if worker.RANK == 1 else 1.0)
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.numel()]
    found: dict[str, Any] = {
        "skipped": run.session.skipped,
        "dropped": all(gradient is None for gradient in gradients),
        "nan": all(gradient is not None and bool(gradient.isnan().all()) for gradient in gradients),
        "languages": sorted({language for language, _ in run.session.last.nonfinite}),
    }
    if on_nonfinite == "drop":
        run.optimizer.step()
        found["unchanged"] = run.parameters == before
    run.optimizer.zero_grad()
    run.window()
    return found | {
        "skipped_later": run.session.skipped,
        "goes_on": run.parameters != before,
        "finite": all(bool(value.isfinite().all()) for value in run.model.state_dict().values()),
        "counters": dict(run.session.moo.counters),
        "parameters": run.parameters,
    }


# --- what must make no difference ---------------------------------------------------------------------------------


def zeroing(how: str, once_a_window: bool = False, **fsdp: Any) -> str:
    """How, and whether, `.grad` is reset between windows and micro-steps."""
    run = Run(micro_steps=2, fsdp=fsdp, once_a_window=once_a_window)
    for _ in range(3):
        with run.model.no_sync() if once_a_window else contextlib.nullcontext():
            run.micro_step()
        if how == "every micro-step":
            run.optimizer.zero_grad()
        run.micro_step()
        run.optimizer.step()
        if how != "never":
            run.optimizer.zero_grad(set_to_none=how != "zeros")
    return run.parameters


def between_micro_steps(**fsdp: Any) -> list[float]:
    """The largest element of all gradients after each micro-step of a window."""
    run = Run(micro_steps=2, fsdp=fsdp)
    found = []
    for _ in range(2):
        run.micro_step()
        gradients = [each.grad for each in run.model.parameters() if each.grad is not None]
        found.append(max(float(gradient.abs().max()) for gradient in gradients if gradient.numel()))
    return found


def unused(**fsdp: Any) -> dict[str, list[bool]]:
    """Two units, of which no rank uses the second: which have gradients, and which an optimizer changes."""
    run = Run(
        module=Sometimes,
        fsdp=fsdp,
        optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, weight_decay=0.1),
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model(torch.ones(3, 4) + worker.RANK, [0], language=worker.RANK % 2).backward()
    units = [list(run.module.layers[index].parameters()) for index in range(2)]
    gradients = [any(parameter.grad is not None for parameter in unit) for unit in units]
    run.optimizer.step()
    after = run.model.state_dict()
    names = ("layers.0.weight", "layers.1.weight")
    return {"gradients": gradients, "changed": [not torch.equal(before[name], after[name]) for name in names]}


def against_plain(layers: Sequence[int], strategy: str) -> float:
    """Units in any order, and more than once, in a forward pass of one language: the largest difference of a combined
    gradient from that of the model without FSDP1, which has it on every rank."""
    run = Run(module=Sometimes, fsdp={"strategy": strategy})
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(SEED))
    plain = Sometimes()
    plain.load_state_dict(run.model.state_dict())
    run.model(inputs, layers, language="de").backward()
    plain(inputs, layers).backward()
    with FullyShardedDataParallel.summon_full_params(run.model, with_grads=True):
        pairs = zip(run.model.parameters(), plain.parameters(), strict=True)
        return max(float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()) for ours, theirs in pairs)


def plain_step() -> str:
    run = Run()
    run.window()
    return run.parameters


def evaluation_before_backward() -> str:
    """A forward pass without gradients between a forward pass and its backward."""
    run = Run()
    loss = run.loss(worker.RANK)
    with torch.no_grad():
        run.model(**toy.micro_batch(0, torch.Generator().manual_seed(1)))
    loss.backward()
    run.optimizer.step()
    return run.parameters


def by_pair() -> str:
    """`comm_hook` and the user's own `register_comm_hook`."""
    torch.manual_seed(SEED)
    model = wrap(toy.ToyLM())
    session, hook = bucketmoo_ds.fsdp1.comm_hook(model, config())
    model.register_comm_hook(session, hook)
    generator = torch.Generator().manual_seed(SEED + worker.RANK)
    with session.language(LANGUAGES[worker.RANK]):
        model(**toy.micro_batch(worker.RANK, generator)).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    return worker.checksum(model.state_dict().values())


def block_names(use_orig_params: bool) -> tuple[list[str], list[str]]:
    """The blocks, and the names of the model's parameters."""
    module = toy.ToyLM(adapters=2)
    names = [name for name, _ in module.named_parameters()]
    for index, layer in enumerate(module.layers):
        module.layers[index] = checkpoint_wrapper(layer)
    model = wrap(module, use_orig_params=use_orig_params)
    return list(bucketmoo_ds.fsdp1.register(model, config(granularity="parameter")).moo.plan.blocks), names


def subgroups() -> dict[str, Any]:
    """Ranks 0, 2 and ranks 1, 3 train a model each."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(SEED)
    model = wrap(toy.ToyLM(), process_group=groups[worker.RANK % 2])
    session = bucketmoo_ds.fsdp1.register(model, config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    language = worker.RANK // 2
    batch = toy.micro_batch(language, torch.Generator().manual_seed(SEED + worker.RANK))
    model(**batch, language=LANGUAGES[language]).backward()
    optimizer.step()
    return {
        "parameters": worker.checksum(model.state_dict().values()),
        "world_size": session.moo.exchange.world_size,
    }


# --- when things happen, and what they send -----------------------------------------------------------------------


def order_of_events(mode: str, strategy: str) -> list[str]:
    """One window: units' gradients, the collectives, and what is combined."""
    run = Run(moo={"mode": mode}, fsdp={"strategy": strategy})
    run.window()
    events: list[str] = []
    exchange = run.session.moo.exchange

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    for name in ("scatter", "all_gather", "all_reduce"):
        setattr(exchange, name, recorded(name, getattr(exchange, name)))
    run.session.moo._sink = recorded("combined", run.session.moo._sink)
    for module in FullyShardedDataParallel.fsdp_modules(run.model):
        module._handle.flat_param.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    run.micro_step()
    return events


def sent(strategy: str) -> dict[str, int]:
    """The bytes of a window of one micro-step, and those of the reduce-scatter that FSDP1 would do."""
    run = Run(fsdp={"strategy": strategy})
    run.micro_step()
    flats = [module._handle.flat_param for module in FullyShardedDataParallel.fsdp_modules(run.model)]
    return dict(run.session.moo.exchange.sent_bytes) | {
        "reduce_scatter": 4 * sum(flat._sharded_size.numel() for flat in flats) * (worker.WORLD_SIZE - 1),
        "elements": sum(flat._unpadded_unsharded_size.numel() for flat in flats),
        "units": len(flats),
    }


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        refused,
        unsynced,
        synced,
        unregistered,
        two_forwards,
        left_behind,
        unequal_units,
        recomputed,
        wrong_language,
        changed_language,
        step_within_a_window,
        backward_after_the_boundary,
        closed,
        unfrozen,
        not_finite,
        zeroing,
        between_micro_steps,
        unused,
        against_plain,
        plain_step,
        evaluation_before_backward,
        by_pair,
        block_names,
        subgroups,
        order_of_events,
        sent,
    )
}

if __name__ == "__main__":
    worker.serve(run)
