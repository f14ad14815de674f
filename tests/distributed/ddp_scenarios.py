"""Worker: what DDP refuses to start with, what ends in an error, and what must make no difference."""

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
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint

import bucketmoo_ds

LANGUAGES = ("de", "fr")
SEED = 11
SMALL = 2 / 1024  # MiB: the toy model then has several of DDP's buckets


def run(name: str, **arguments: Any) -> Any:
    return SCENARIOS[name](**arguments)


def config(**changes: Any) -> bucketmoo_ds.BucketMOOConfig:
    return bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, **changes)


class Run:
    """A toy model under DDP, and what is needed to train it."""

    def __init__(
        self,
        *,
        module: Callable[[], nn.Module] | None = None,
        ddp: dict[str, Any] | None = None,
        moo: dict[str, Any] | None = None,
        adapters: int = 0,
        optimizer: Any = torch.optim.SGD,
        **register: Any,
    ) -> None:
        torch.manual_seed(SEED)
        self.module = module() if module else toy.ToyLM(adapters=adapters)
        self.model = DistributedDataParallel(self.module, **({"bucket_cap_mb": SMALL} | (ddp or {})))
        self.micro_steps = register.get("micro_steps", 1)
        self.session = bucketmoo_ds.ddp.register(
            self.model, config(**(moo or {})), **({"bucket_size": 700} | register)
        )
        self.optimizer = optimizer(self.model.parameters(), lr=0.05)
        self.generator = torch.Generator().manual_seed(SEED + worker.RANK)

    def loss(self, language: int, **batch: Any) -> Tensor:
        batch = toy.micro_batch(language, self.generator) | batch
        return self.model(**batch, language=LANGUAGES[language]) / self.micro_steps

    def micro_step(self, **batch: Any) -> None:
        self.loss(worker.RANK % 2, **batch).backward()

    def window(self, **batch: Any) -> None:
        for _ in range(self.micro_steps):
            self.micro_step(**batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> str:
        return worker.checksum(self.model.parameters())


# --- refused at start-up ------------------------------------------------------------------------------------------


def refused(case: str) -> None:
    REFUSED[case]()


def _register(module: nn.Module, **ddp: Any) -> None:
    bucketmoo_ds.ddp.register(DistributedDataParallel(module, **ddp), config())


def _no_ddp() -> None:
    bucketmoo_ds.ddp.register(toy.ToyLM(), config())


def _hooked() -> None:
    model = DistributedDataParallel(toy.ToyLM())
    model.register_comm_hook(None, noop_hook)
    bucketmoo_ds.ddp.register(model, config())


def _built_in_hook() -> None:
    model = DistributedDataParallel(toy.ToyLM())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    bucketmoo_ds.ddp.register(model, config())


def _twice() -> None:
    model = DistributedDataParallel(toy.ToyLM())
    for _ in range(2):
        bucketmoo_ds.ddp.register(model, config())


def _optimizer_in_backward() -> None:
    module = toy.ToyLM()
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    _register(module)


def _post_accumulate() -> None:
    module = toy.ToyLM()
    module.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    _register(module)


def _mixed_precision() -> None:
    _register(toy.ToyLM(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))


def _python_reducer() -> None:
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        _register(toy.ToyLM())


def _ignored() -> None:
    module = toy.ToyLM()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["head.weight"])
    _register(module)


def _delayed() -> None:
    module = toy.ToyLM()
    named = list(module.named_parameters())[-1:]
    _register(module, delay_all_reduce_named_params=named, param_to_hook_all_reduce=module.embed.weight)


def _sparse() -> None:
    module = toy.ToyLM()
    module.embed = nn.Embedding(toy.VOCABULARY, 13, sparse=True)
    _register(module)


def _tensor_parallel() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (1, worker.WORLD_SIZE), mesh_dim_names=("data", "tensor"))
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel()})
    _register(module, device_mesh=mesh["data"])


def _no_bucket() -> None:
    bucketmoo_ds.ddp.register(DistributedDataParallel(toy.ToyLM()), config(), bucket_size=0)


REFUSED: dict[str, Callable[[], None]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _no_ddp,
        _hooked,
        _built_in_hook,
        _twice,
        _optimizer_in_backward,
        _post_accumulate,
        _mixed_precision,
        _python_reducer,
        _ignored,
        _delayed,
        _sparse,
        _tensor_parallel,
        _no_bucket,
    )
}

# --- errors on every rank -----------------------------------------------------------------------------------------


def unsynced(ranks: Sequence[int], once_a_window: bool = False) -> None:
    """These ranks run a micro-step under `no_sync` that has to be exchanged; the one before it need not be."""
    run = Run(micro_steps=2, once_a_window=once_a_window)
    if once_a_window:
        run.micro_step()
    with run.model.no_sync() if worker.RANK in ranks else contextlib.nullcontext():
        run.micro_step()


def two_forwards() -> None:
    """DDP reduces in the first backward after its latest forward pass only."""
    run = Run(micro_steps=2)
    first, second = run.loss(0), run.loss(0)
    with run.session.language("de"):
        first.backward()
        second.backward()


def wrong_language(rank: int) -> None:
    run = Run()
    language = "es" if rank == worker.RANK else "de"
    run.model(**toy.micro_batch(0, run.generator), language=language).backward()


def changed_language() -> None:
    run = Run(micro_steps=2, once_a_window=True)
    for language in (0, 1):
        run.loss(language).backward()


def step_within_a_window() -> None:
    run = Run(micro_steps=2)
    run.micro_step()
    run.optimizer.step()


def backward_after_the_boundary() -> None:
    run = Run()
    run.micro_step()
    run.micro_step()


def joined() -> None:
    run = Run()
    with run.model.join():
        for _ in range(2 + worker.RANK):
            run.window()


class Sealed:
    """A type of output that nobody looks into."""

    def __init__(self, content: Tensor) -> None:
        self.content = content


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.toy = toy.ToyLM()

    def forward(self, **batch: Any) -> Sealed:
        return Sealed(self.toy(**batch))


def hidden_output() -> None:
    run = Run(module=Hidden)
    run.model(**toy.micro_batch(0, run.generator), language="de").content.backward()


def unfrozen() -> None:
    """A parameter that DDP does not know of is trained."""
    torch.manual_seed(SEED)
    module = toy.ToyLM(frozen=True)
    model = DistributedDataParallel(module)
    module.requires_grad_(True)
    session = bucketmoo_ds.ddp.register(model, config())
    with session.language("de"):
        model(**toy.micro_batch(0, torch.Generator().manual_seed(SEED))).backward()


def failing_hook() -> None:
    """Something goes wrong inside the hook, on all ranks."""
    run = Run()

    def fail(*_: Any) -> None:
        raise ValueError("the exchange failed")

    run.session.moo.exchange.scatter = fail  # type: ignore[method-assign]
    run.micro_step()


# --- windows that are not finite ----------------------------------------------------------------------------------


def not_finite(mode: str, micro_steps: int, on_nonfinite: str, bucket_view: bool) -> dict[str, Any]:
    """In the second of three windows, the gradients of "fr" (rank 1) are NaN."""
    run = Run(
        ddp={"gradient_as_bucket_view": bucket_view},
        moo={"mode": mode},
        micro_steps=micro_steps,
        on_nonfinite=on_nonfinite,
        optimizer=torch.optim.Adam,
    )
    run.window()
    before = run.parameters
    for _ in range(micro_steps):
        (run.loss(worker.RANK) * (math.nan if worker.RANK == 1 else 1.0)).backward()
    gradients = [parameter.grad for parameter in run.model.parameters()]
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
        "finite": all(bool(parameter.isfinite().all()) for parameter in run.model.parameters()),
        "counters": dict(run.session.moo.counters),
        "parameters": run.parameters,
    }


# --- what must make no difference ---------------------------------------------------------------------------------


def rebuilt_buckets(cap: float) -> dict[str, Any]:
    """The adapter is used before the head, but registered after it: DDP's first buckets are not its later ones."""
    torch.manual_seed(SEED)
    model = DistributedDataParallel(toy.ToyLM(adapters=1), bucket_cap_mb=cap)
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    session, hook = bucketmoo_ds.ddp.comm_hook(model, config(), micro_steps=2, bucket_size=700)
    layouts: list[list[list[str]]] = []

    def recorded(state, bucket):  # DDP does not read annotations that are text, as they are in this file
        if bucket.index() == 0:
            layouts.append([])
        layouts[-1].append([names[parameter] for parameter in bucket.parameters()])
        return hook(state, bucket)

    model.register_comm_hook(session, recorded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(SEED + worker.RANK)
    for _ in range(2):
        for language in (0, 1):
            batch = toy.micro_batch(language, generator) | {"adapter": 0}
            (model(**batch, language=LANGUAGES[language]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"layouts": layouts, "parameters": worker.checksum(model.parameters())}


def zeroing(how: str, bucket_view: bool) -> str:
    """How, and whether, `.grad` is reset between windows and micro-steps."""
    run = Run(micro_steps=2, ddp={"gradient_as_bucket_view": bucket_view})
    for _ in range(3):
        for _ in range(2):
            run.micro_step()
            if how == "every micro-step" and run.session.moo.in_window:
                run.optimizer.zero_grad()
        run.optimizer.step()
        if how != "never":
            run.optimizer.zero_grad(set_to_none=how != "zeros")
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


def plain_step() -> str:
    run = Run()
    run.window()
    return run.parameters


def gradients_of(adapters: Sequence[int | None]) -> list[dict[str, str]]:
    """With `find_unused_parameters`, rank r uses adapter `adapters[r]`: which parameters have a gradient, and whether
    it is zero, after each micro-step of a window."""
    run = Run(adapters=3, ddp={"find_unused_parameters": True}, micro_steps=2)
    found = []
    for _ in range(2):
        run.micro_step(adapter=adapters[worker.RANK])
        found.append(
            {
                name: "none" if each.grad is None else "zero" if not bool(each.grad.any()) else "some"
                for name, each in run.module.named_parameters()
            }
        )
    return found


def bucket_views() -> bool:
    """`.grad` stays the view of DDP's bucket: memory is shared between neighbours."""
    run = Run(ddp={"gradient_as_bucket_view": True, "bucket_cap_mb": 25})
    for _ in range(3):
        run.window()
    run.micro_step()
    gradients = [parameter.grad for parameter in run.model.parameters()]
    return len({gradient.untyped_storage().data_ptr() for gradient in gradients if gradient is not None}) == 1


def frozen_after_wrapping() -> bool:
    torch.manual_seed(SEED)
    module = toy.ToyLM()
    model = DistributedDataParallel(module, find_unused_parameters=True)
    module.layers[1].requires_grad_(False)
    session = bucketmoo_ds.ddp.register(model, config())
    with session.language(worker.RANK % 2):
        model(**toy.micro_batch(0, torch.Generator().manual_seed(SEED))).backward()
    return all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())


class Recomputed(nn.Module):
    """One layer in two reentrant checkpoints: its gradient comes twice in a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, reentrant: bool) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(2):
            hidden = checkpoint(lambda value: self.shared(value).tanh(), hidden, use_reentrant=reentrant)
        return self.last(hidden).square().mean()


def recomputed(reentrant: bool) -> str:
    """`static_graph` is DDP's own way to have reentrant checkpoints of a shared layer."""
    run = Run(module=Recomputed, ddp={"static_graph": True}, micro_steps=2)
    for _ in range(2):
        for _ in range(2):
            inputs = torch.randn(6, 4, generator=run.generator)
            (run.model(inputs, reentrant=reentrant, language=worker.RANK % 2) / 2).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.parameters


def subgroups() -> dict[str, Any]:
    """Ranks 0, 2 and ranks 1, 3 train a model each."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(SEED)
    model = DistributedDataParallel(toy.ToyLM(), process_group=groups[worker.RANK % 2])
    session = bucketmoo_ds.ddp.register(model, config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    language = worker.RANK // 2
    batch = toy.micro_batch(language, torch.Generator().manual_seed(SEED + worker.RANK))
    model(**batch, language=LANGUAGES[language]).backward()
    optimizer.step()
    return {"parameters": worker.checksum(model.parameters()), "world_size": session.moo.exchange.world_size}


# --- when things happen -------------------------------------------------------------------------------------------


def order_of_events(mode: str) -> list[str]:
    """One window: the hook's calls, the scatters and the gathers, and the end of backward."""
    run = Run(moo={"mode": mode})
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
    for parameter in run.module.parameters():
        parameter.register_hook(lambda _: events.append("gradient"))
    run.micro_step()
    return events


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        refused,
        unsynced,
        two_forwards,
        wrong_language,
        changed_language,
        step_within_a_window,
        backward_after_the_boundary,
        joined,
        hidden_output,
        unfrozen,
        failing_hook,
        not_finite,
        rebuilt_buckets,
        zeroing,
        evaluation_before_backward,
        plain_step,
        gradients_of,
        bucket_views,
        frozen_after_wrapping,
        recomputed,
        subgroups,
        order_of_events,
    )
}

if __name__ == "__main__":
    worker.serve(run)
