"""FSDP1 (`FullyShardedDataParallel`): `register(model, config)` after wrapping, built on `register_comm_hook`.

Read in torch 2.13.0, `torch/distributed/fsdp/_runtime_utils.py` and `_flat_param.py`. A bucket is a unit of FSDP1: its
flat parameter, cut into W equal slices (FULL_SHARD, SHARD_GRAD_OP) or whole on every rank (NO_SHARD). FSDP1 hands the
hook a unit's whole gradient and is given zeros, which make `.grad`; the combined gradient is written there when FSDP1
has done with it, but backward has not returned. So the wire may be bfloat16 while rows and results are float32,
gradients may lie on the CPU, and a window's gradients are there for clipping as for the optimizer.

Sliced, a rank sends what FSDP1's own reduce-scatter sends, (W-1)/W N for N bytes of gradients. Whole, it sends that in
each exchange, and (W-1)/W N of combined ones once a window; FSDP1's own all-reduce sends 2 (W-1)/W N in every
micro-step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

from bucketmoo_ds.adapters.hooks import Hook
from bucketmoo_ds.adapters.session import Session, unwrapped
from bucketmoo_ds.adapters.sharded import Sharded, stream_of
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.plan.blocks import BlockPlan, Parameter, Run, Segments, granularity_of, plain_name, plan_buckets
from bucketmoo_ds.plan.choices import create_exchange
from bucketmoo_ds.plan.refined import Refined

CommHook = Callable[..., None]

# What is read, or written, later than at register; `_unit` reads the rest.
_read_later = operator.attrgetter(
    "_comm_hook", "_comm_hook_state", "_sync_gradients", "_handle._reduce_dtype", "_handle.sharded_grad"
)


def register(
    model: FullyShardedDataParallel,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> Session:
    """Makes FSDP1 resolve the conflicts of a model's languages inside its gradient reduction.

    Call it on all ranks, after wrapping and before the first forward pass. Every micro-batch then names its language:
    by an entry of the batch (`config.language_key`), or inside `with session.language("de"):`. Divide the loss by
    `micro_steps` as usual. When the last backward of a window returns, `.grad` holds the combined gradient; after the
    ones before it, zeros.

    Args:
        model: the root `FullyShardedDataParallel` module.
        config: the settings.
        micro_steps: M, backward passes between two optimizer steps.
        once_a_window: whether each rank adds up its micro-steps, unsharded, and exchanges them at the boundary: fewer
            bytes, more memory, and each rank keeps one language for the window. Run the micro-steps before the boundary
            under `model.no_sync()`.
        on_nonfinite: see `Session`.

    Returns:
        The session: `session.last` is the latest window's resolution.

    Raises:
        ConfigError: the model, or a setting of FSDP1, does not allow it; the message says what does.
    """
    session, hook = comm_hook(
        model, config, micro_steps=micro_steps, once_a_window=once_a_window, on_nonfinite=on_nonfinite
    )
    unwrapped(model).register_comm_hook(session, hook)
    return session


def comm_hook(
    model: FullyShardedDataParallel,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> tuple[Session, CommHook]:
    """Returns what `model.register_comm_hook` takes: the session, and the hook. See `register`."""
    root = unwrapped(model)
    units = _units(root)
    trained = [unit for unit in units if any(unit.trained)]
    _refuse(root, trained)
    _refuse_unmanaged(root, trained)
    plan = _plan(root, trained, granularity_of(config))
    group: Any = trained[0].module.process_group
    exchange = create_exchange(config, group)
    adapter = FSDP1Adapter(root, units, trained, plan, exchange)
    dtype = functools.reduce(torch.promote_types, [unit.flat.dtype for unit in trained])
    adapter.make_pipeline(config, micro_steps, once_a_window, trained[0].device, dtype)
    session = Session(model, config, adapter, on_nonfinite)
    adapter.install()
    return session, Hook(adapter.hook)


@dataclasses.dataclass
class _Unit:
    """One unit of FSDP1.

    Args:
        handle: FSDP1's keeper of the flat parameter.
        flat: the flat parameter.
        parameters: what optimizers are given: views of the flat one (`use_orig_params`), or itself.
        device: where its gradient is reduced; parameters themselves may be offloaded.
        sharded_already: whether tensor parallelism has sharded its parameters before.
        owners: for each of its parameters, the module and the name there.
        shared: the same for tied ones, beyond their first.
        offsets: where each of them starts in the flat parameter, which pads between them for alignment.
        numels: elements of each.
        trained: whether each of them takes a gradient.
        numel: elements of the flat parameter.
        shard_numel: elements of each rank's slice of it; 0 where every rank keeps all of it.
        indices: of the trained parameters in the plan.
    """

    module: FullyShardedDataParallel
    handle: Any
    flat: Any
    parameters: list[nn.Parameter]
    device: torch.device
    sharded_already: bool
    owners: list[tuple[nn.Module, str]]
    shared: list[tuple[nn.Module, str]]
    offsets: list[int]
    numels: list[int]
    trained: list[bool]
    numel: int
    shard_numel: int
    indices: dict[int, int] = dataclasses.field(default_factory=dict)


def _units(model: FullyShardedDataParallel) -> list[_Unit]:
    """All units, from the model's last to its first, as backward delivers them.

    FSDP1 offers no public way to ask what a flat parameter consists of.
    """
    if not isinstance(model, FullyShardedDataParallel):
        raise ConfigError(
            f"fsdp1.register: {type(model).__name__} is no FullyShardedDataParallel module; wrap the model first, or "
            "use bucketmoo_ds.fsdp2 after fully_shard"
        )
    try:
        return [_unit(each) for each in FullyShardedDataParallel.fsdp_modules(model)[::-1] if each._handle is not None]
    except AttributeError as error:
        raise ConfigError(
            f"fsdp1.register: torch {torch.__version__} keeps flat parameters in another way than 2.13.0, which "
            f"bucketmoo_ds reads ({error}); use torch 2.11 to 2.14, or fully_shard and bucketmoo_ds.fsdp2"
        ) from error


def _unit(module: FullyShardedDataParallel) -> _Unit:
    _read_later(module)
    handle: Any = module._handle
    flat = handle.flat_param
    starts = itertools.accumulate(flat._numels_with_padding, initial=0)
    padding = flat._is_padding_mask
    return _Unit(
        module=module,
        handle=handle,
        flat=flat,
        parameters=[flat] if flat._params is None else flat._params,
        device=handle.device,
        sharded_already=any(extension is not None for extension in flat._param_extensions),
        owners=[(info.module, info.param_name) for info in flat._param_infos],
        shared=[(info.module, info.param_name) for info in flat._shared_param_infos],
        offsets=[start for start, is_padding in zip(starts, padding, strict=False) if not is_padding],
        numels=list(flat._numels),
        trained=_trained(flat),
        numel=flat._unpadded_unsharded_size.numel(),
        shard_numel=flat._sharded_size.numel() if handle.uses_sharded_strategy else 0,
    )


def _trained(flat: Any) -> list[bool]:
    if flat._params is None:  # use_orig_params=False
        return [flat.requires_grad] * len(flat._numels)
    return [parameter.requires_grad for parameter in flat._params]


def _refuse(model: FullyShardedDataParallel, units: Sequence[_Unit]) -> None:
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if hasattr(module, "_inter_node_pg"):  # FSDP1 may have switched to NO_SHARD meanwhile
            raise ConfigError(
                "fsdp1.register: sharding_strategy = HYBRID_SHARD or _HYBRID_SHARD_ZERO2: FSDP1 takes no communication "
                "hook there, for it adds up the replicas' gradients after the reduce-scatter, and that would be a sum "
                "of combined ones; use fully_shard on a 2-D mesh and bucketmoo_ds.fsdp2, or FULL_SHARD"
            )
        if module._comm_hook is not None:
            raise ConfigError(
                "fsdp1.register: the model has a communication hook already, and FSDP1 takes one; leave it out"
            )
    if not units:
        raise ConfigError("fsdp1.register: no unit of the model has a trainable parameter")
    if any(unit.module.process_group is not units[0].module.process_group for unit in units):
        raise ConfigError("fsdp1.register: units have different process groups; give all units the same")
    for unit in units:
        if unit.sharded_already:
            raise ConfigError(
                "fsdp1.register: parameters are sharded before FSDP1 shards them (tensor parallelism), and their "
                "blocks would be resolved in parts; leave out tensor parallelism"
            )
        for parameter in (unit.flat, *unit.parameters):
            if getattr(parameter, "_in_backward_optimizers", None) or parameter._post_accumulate_grad_hooks:
                raise ConfigError(
                    "fsdp1.register: a parameter has an optimizer in backward (a post-accumulate-grad hook), which "
                    "would step before the gradients are combined; step after backward"
                )


def _refuse_unmanaged(model: FullyShardedDataParallel, units: Sequence[_Unit]) -> None:
    managed = {place for unit in units for place in unit.owners + unit.shared}
    unmanaged = [
        plain_name(f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and not isinstance(parameter, FlatParameter) and (module, name) not in managed
    ]
    if unmanaged:
        raise ConfigError(
            f'fsdp1.register: parameter "{unmanaged[0]}" is trained, but no unit holds it there ({len(unmanaged)} in '
            "all), so that its gradient would not pass through the reduction: do not ignore it, add adapters before "
            "wrapping, wrap tied weights in one unit, or freeze it"
        )


def _plan(model: FullyShardedDataParallel, units: Sequence[_Unit], granularity: str | Refined) -> BlockPlan:
    """The plan over the trained parameters in the order of the model without wrappers."""
    modules = {module: (position, prefix) for position, (prefix, module) in enumerate(model.named_modules())}
    found = [
        (*modules[owner], unit, place)
        for unit in units
        for place, (owner, _) in enumerate(unit.owners)
        if unit.trained[place]
    ]
    parameters = []
    for index, (_, prefix, unit, place) in enumerate(sorted(found, key=lambda each: each[0])):
        parameters.append(Parameter(plain_name(f"{prefix}.{unit.owners[place][1]}"), unit.numels[place]))
        unit.indices[place] = index
    return plan_buckets(parameters, [sorted(unit.indices.values()) for unit in units], granularity)


class FSDP1Adapter(Sharded):
    """Takes what FSDP1 would reduce, unit by unit, and writes combined gradients.

    Args:
        model: the root module.
        everything: all units, as they were at register.
        units: those with something to train, in the plan's order.
    """

    def __init__(
        self,
        model: FullyShardedDataParallel,
        everything: Sequence[_Unit],
        units: Sequence[_Unit],
        plan: BlockPlan,
        exchange: Exchange,
    ) -> None:
        super().__init__(plan, exchange)
        self._model = model
        self._everything = everything
        self._units = units
        self._used: set[int] = set()

    def install(self) -> None:
        """Hooks the flat parameters."""
        self._handles = [
            unit.flat.register_hook(functools.partial(self._come, bucket)) for bucket, unit in enumerate(self._units)
        ]

    def obstacle(self, boundary: bool) -> LanguageError | None:
        """See `Adapter`. Ranks may differ in it."""
        reduces, exchanges = self._model._sync_gradients, boundary or not self.moo.window.once_a_window
        if exchanges and not reduces:
            return LanguageError(
                "this backward ran under no_sync(), which would mix the languages of a rank's micro-steps: leave it "
                "out, or register with once_a_window=True, keep one language a rank and window, and use no_sync() for "
                "all micro-steps but the last"
            )
        if reduces and not exchanges:
            return LanguageError(
                "once_a_window=True, but this micro-step, which is not the window's last, ran without no_sync(): run "
                "its forward and backward inside `with model.no_sync():`"
            )
        return None

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """See `Adapter`. FSDP1 may have put some aside by now."""
        aside = [unit.flat._saved_grad_shard for unit in self._units if hasattr(unit.flat, "_saved_grad_shard")]
        return super().gradients(parameters) + aside

    def begin(self) -> None:
        """See `Adapter`. What `.grad` held before a window is no part of it.

        Raises:
            BucketMOOError: the model is not as it was at register, or FSDP1 has no hook.
        """
        for unit in self._everything:
            if _trained(unit.flat) != unit.trained:
                raise BucketMOOError(
                    "parameters were frozen or unfrozen after fsdp1.register, which fixed the blocks; do it before"
                )
        for bucket, unit in enumerate(self._units):
            if unit.module._comm_hook is None:
                raise BucketMOOError(
                    "FSDP1 averages languages, for it has no hook: pass what fsdp1.comm_hook returned to "
                    "model.register_comm_hook(session, hook), or use fsdp1.register, which does"
                )
            # Units are given one state, and the hook is not told whose gradient it gets.
            unit.module._comm_hook_state = bucket
        super().begin()
        if self.micro.first:
            self._used.clear()
            self._drop_gradients()

    def _come(self, bucket: int, gradient: Tensor) -> Tensor | None:
        """The gradient of a flat parameter, before it is added to others, whatever FSDP1 makes of it."""
        scaled = self.scaled(gradient)
        self._used.add(bucket)
        return scaled

    def hook(self, state: Any, gradient: Tensor, shard: Tensor | None = None) -> None:
        """What FSDP1 calls in place of its reduction of one unit.

        Args:
            state: the bucket.
            gradient: `[W * s]`, padded with zeros; or `[N]`, which becomes `.grad`, where ranks keep all of it.
            shard: `[s]`, becomes `.grad`; `None` where ranks keep all of it.

        Raises:
            BucketMOOError: the unit comes a second time.
        """
        self.arrive()
        if shard is not None:
            flat = gradient
            shard.zero_()
        else:
            flat = self._empty(state, gradient.dtype)
            flat[: gradient.numel()] = gradient
            gradient.zero_()
        twice = (
            "two reentrant checkpoints in one unit do that); use torch.utils.checkpoint with use_reentrant=False, or "
            "wrap each checkpointed module in a unit"
        )
        self.put(state, flat, twice)

    def end(self) -> list[bool]:
        """See `Adapter`. A unit that no rank used counts as a gradient of zeros; a parameter that a used unit did not
        use has one.

        Raises:
            BucketMOOError: FSDP1 left a gradient behind.
        """
        if not self.micro.exchanges:
            return [False] * len(self._plan.parameters)
        left = sorted(bucket for bucket in self._used if not self._release.is_complete(bucket))
        if left:
            raise BucketMOOError(
                f"{self._plan.buckets[left[0]].name} ({len(left)} in all) has a gradient that FSDP1 did not reduce: "
                "call backward once after every forward pass, before the next one; and where micro-steps run under "
                "no_sync(), use all their units in the window's last one too"
            )
        self._used.clear()
        reduced = [bucket for bucket in range(len(self._units)) if self._release.is_complete(bucket)]
        self._release.finish()
        contributed = {index for bucket in reduced for index in self._plan.buckets[bucket].parameters}
        return [index in contributed for index in range(len(self._plan.parameters))]

    def gather(self, bucket: int, shard: Tensor) -> Received | None:
        """See `Sharded`."""
        return None if self._units[bucket].shard_numel else self._exchange.all_gather(shard)

    def abandon(self) -> None:
        """See `Adapter`."""
        super().abandon()
        self._used.clear()
        self._drop_gradients()

    def segments(self, bucket: int) -> Segments:
        """Returns the segments of this rank's slice of a bucket."""
        unit, slice_numel = self._units[bucket], self._slice_numel(bucket)
        runs = [Run(index, unit.offsets[place], unit.numels[place]) for place, index in unit.indices.items()]
        start = self._exchange.rank * slice_numel
        return self._plan.segments_of(bucket, sorted(runs, key=lambda run: run.start), start, start + slice_numel)

    def absent(self, bucket: int) -> Tensor:
        """See `Sharded`."""
        return self._empty(bucket, self._units[bucket].handle._reduce_dtype)

    def _drop_gradients(self) -> None:
        for unit in self._units:
            for parameter in (unit.flat, *unit.parameters):
                parameter.grad = None
            if hasattr(unit.flat, "_saved_grad_shard"):
                del unit.flat._saved_grad_shard

    @torch.no_grad()
    def write_shard(self, bucket: int, combined: Tensor) -> None:
        """See `Sharded`."""
        gradient = self._units[bucket].handle.sharded_grad  # what `.grad` is, or will be; parameters' are views of it
        if gradient is not None:  # what no rank used has no gradient, as without us
            if combined.device.type != "cpu":  # FSDP1 may not be through with making it
                stream_of(combined).wait_stream(self._units[bucket].module._post_backward_stream)
            gradient.copy_(combined[: gradient.numel()])

    def _empty(self, bucket: int, dtype: torch.dtype) -> Tensor:
        numel = self._slice_numel(bucket) * self._exchange.world_size
        return torch.zeros(numel, dtype=dtype, device=self._units[bucket].device)

    def _slice_numel(self, bucket: int) -> int:
        unit = self._units[bucket]
        return unit.shard_numel or self._exchange.shard_numel(unit.numel)
