"""FSDP2: `register(model, config)` after `fully_shard`, built on `set_custom_reduce_scatter`.

Read in torch 2.13.0, `torch/distributed/fsdp/_fully_shard`. A bucket is a parameter group of FSDP2; its reduce-scatter
input is `[W * s]`, where slice j holds rank j's padded chunk of every parameter. What the reduce-scatter returns is not
used: the combined gradient is written into the parameters' `.grad`, which FSDP2 has made by then. So the wire may be
bfloat16 while rows and results are float32, gradients may lie on the CPU, and a window's gradients are there when
backward returns, for clipping as for the optimizer.

With replicas (HSDP, a 2-D mesh) FSDP2 would add the replicas' gradients up after the reduce-scatter, and that sum would
be one of already combined gradients. So it is told not to, all ranks exchange with each other, and the replicas gather
the combined pieces: where a replica trains on one language that costs what FSDP2's own reduction does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from bucketmoo_ds.adapters.hooks import Hook, graph_task
from bucketmoo_ds.adapters.session import Session, unwrapped
from bucketmoo_ds.adapters.sharded import Sharded, stream_of
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.plan.blocks import BlockPlan, Parameter, Run, Segments, granularity_of, plain_name, plan_buckets
from bucketmoo_ds.plan.choices import create_exchange
from bucketmoo_ds.plan.refined import Refined


def register(
    model: nn.Module,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> Session:
    """Makes FSDP2 resolve the conflicts of a model's languages inside its gradient reduction.

    Call it on all ranks, after `fully_shard` and before the first forward pass. Every micro-batch then names its
    language: by an entry of the batch (`config.language_key`), or inside `with session.language("de"):`. Divide the
    loss by `micro_steps` as usual. When the last backward of a window returns, `.grad` holds the combined gradient;
    that of a parameter that no rank has used is zero.

    Args:
        model: the root module, to which `fully_shard` was applied.
        config: the settings.
        micro_steps: M, backward passes between two optimizer steps.
        once_a_window: whether each rank adds up its micro-steps, unsharded, and exchanges them at the boundary: fewer
            bytes, more memory, and each rank keeps one language for the window. FSDP2's `set_requires_gradient_sync`
            is then set here.
        on_nonfinite: see `Session`.

    Returns:
        The session: `session.last` is the latest window's resolution.

    Raises:
        ConfigError: the model, its mesh or a setting of FSDP2 does not allow it; the message says what does.
    """
    root: Any = unwrapped(model)
    if not isinstance(root, FSDPModule):
        raise ConfigError(
            f"fsdp2.register: {type(root).__name__} is no FSDP2 module; apply fully_shard to the root module first"
        )
    groups = _groups(root)[::-1]  # as backward delivers them
    mesh = _common_mesh(groups)
    exchange, replicas = _exchange(mesh, config)
    plan = _plan(root, groups, granularity_of(config))
    adapter = FSDP2Adapter(root, groups, plan, exchange, replicas)
    adapter.make_pipeline(config, micro_steps, once_a_window, torch.device(mesh.device_type))
    session = Session(model, config, adapter, on_nonfinite)
    adapter.install()
    return session


@dataclasses.dataclass
class _Group:
    """One parameter group of FSDP2 and what it trains.

    Args:
        module: where to set its communication.
        own: FSDP2's keeper of the group.
        members: its keepers of the trainable parameters, in order.
        padded: elements of each parameter's padded chunk.
        indices: of the parameters in the plan.
        communication: what FSDP2 calls for the group in place of its reduce-scatter.
        watched: the `id` of the keepers whose unsharded parameter is hooked.
    """

    module: FSDPModule
    own: Any
    members: list[Any]
    padded: list[int]
    indices: list[int] = dataclasses.field(default_factory=list)
    communication: Any = None
    watched: set[int] = dataclasses.field(default_factory=set)

    @property
    def parameters(self) -> list[Any]:
        """The DTensors, asked for anew: loading a checkpoint may replace them."""
        return [each.sharded_param for each in self.members]

    @property
    def mesh(self) -> DeviceMesh:
        mesh: DeviceMesh = self.parameters[0].device_mesh
        return mesh

    @property
    def shard_numel(self) -> int:
        return sum(self.padded)

    @property
    def trained(self) -> list[bool]:
        """Of its members, which are not frozen now: FSDP2 reduces these."""
        return [each.sharded_param.requires_grad for each in self.members]

    @property
    def is_watched(self) -> bool:
        """Whether all unsharded parameters that it trains are hooked."""
        return all(id(each) in self.watched for each in self.members if each.sharded_param.requires_grad)

    @property
    def unused(self) -> bool:
        """Whether no forward pass has ever come here; FSDP2 then has no gradients to fill up with zeros."""
        return not any(hasattr(each, "_unsharded_param") for each in self.members)

    def fill_accumulated(self) -> None:
        """Gives parameters that were not used zeros of the dtype in which FSDP2 adds micro-steps up, so that it finds
        one dtype when it reduces them with those that were."""
        for each in self.members:
            added_up = each.reduce_dtype
            if added_up is None or not hasattr(each, "_unsharded_param") or not each.sharded_param.requires_grad:
                continue
            if each._unsharded_param.dtype != added_up and each.unsharded_accumulated_grad is None:
                shape, device = each._unsharded_param.shape, each._unsharded_param.device
                each.unsharded_accumulated_grad = torch.zeros(shape, dtype=added_up, device=device)

    def drop_gradients(self) -> None:
        """Drops what FSDP2 has added up."""
        for each in self.members:
            each.unsharded_accumulated_grad = None
            if hasattr(each, "_unsharded_param"):
                each._unsharded_param.grad = None

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of what FSDP2 reduces."""
        first = self.members[0]
        dtype: torch.dtype = first.reduce_dtype or first.param_dtype or first.orig_dtype
        return dtype


def _groups(model: Any) -> list[_Group]:
    """The parameter groups that have something to train, in the model's order."""
    groups: list[_Group] = []
    for name, module, own in _own_groups(model):
        _refuse(name, own)
        for each in own.fsdp_params:
            if not each.sharded_param.numel():  # nothing to train, and FSDP2 cannot reduce the zeros that it fills in
                each.sharded_param.requires_grad_(False)
        trained = [each for each in own.fsdp_params if each.sharded_param.requires_grad]
        if trained:
            padded = [each.padded_sharded_param_size.numel() for each in trained]
            groups.append(_Group(module, own, trained, padded))
    if problem := _hooked(model.named_parameters()):
        raise ConfigError(f"fsdp2.register: {problem}")
    if not groups:
        raise ConfigError("fsdp2.register: the model has no trainable parameter that fully_shard has taken")
    taken = {id(parameter) for group in groups for parameter in group.parameters}
    others = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in taken]
    if others:
        raise ConfigError(
            f'fsdp2.register: parameter "{others[0]}" is trained, but fully_shard has not taken it ({len(others)} in '
            "all), so that its gradient would not pass through the reduction: add adapters before fully_shard, do not "
            "ignore it, or freeze it"
        )
    return groups


def _own_groups(model: nn.Module) -> list[tuple[str, FSDPModule, Any]]:
    """FSDP2's own keepers of all parameter groups, each with a module that has it, in the model's order.

    FSDP2 offers no public way to ask which parameters a group holds, in which order.
    """
    found: dict[int, tuple[str, FSDPModule, Any]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()  # a forward pass without backward leaves parameters unsharded
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.13 there is one at most
            groups = [each for each in (state._fsdp_param_group,) if each is not None]
        if len(groups) > 1:
            raise ConfigError(
                f'fsdp2.register: module "{name}" has several parameter groups (parameters on several meshes), for '
                "which FSDP2 takes no custom reduce-scatter; apply fully_shard to a module for each mesh"
            )
        for own in groups:
            found.setdefault(id(own), (name, module, own))
    return list(found.values())


def _refuse(name: str, group: Any) -> None:
    if isinstance(group._reduce_scatter_comm, _Communication):
        if group._reduce_scatter_comm.is_open:
            raise ConfigError("fsdp2.register: the model is registered already; register it once, or close the session")
        return
    communication = type(group._reduce_scatter_comm).__name__
    if communication != "DefaultReduceScatter":
        raise ConfigError(
            f'fsdp2.register: the reduce-scatter of module "{name}" is {communication}, which it replaces; leave out '
            "set_symm_mem_for_comm, set_allocate_memory_from_process_group_for_comm and set_custom_reduce_scatter"
        )
    if group._all_reduce_hook is not None:
        raise ConfigError(
            f'fsdp2.register: module "{name}" has an all-reduce hook, which would add up combined gradients; leave '
            "out set_all_reduce_hook and shard on a 2-D mesh instead"
        )


def _hooked(named: Iterable[tuple[str, Tensor]]) -> str:
    """Which hook of a sharded parameter is in the way, and why; empty for none."""
    for name, parameter in named:
        if parameter._post_accumulate_grad_hooks:
            return (
                f'parameter "{name}" has a post-accumulate-grad hook (an optimizer in backward), which would run '
                "before the gradients are combined; step after backward"
            )
        if parameter._backward_hooks:
            return (
                f'parameter "{name}" has a gradient hook (register_hook), which FSDP2 never calls, for it computes '
                "with other tensors: freeze what the hook masks, or take DDP or DeepSpeed, which call it"
            )
    return ""


def _common_mesh(groups: Sequence[_Group]) -> DeviceMesh:
    mesh = groups[0].mesh
    if any(group.mesh != mesh for group in groups):
        raise ConfigError("fsdp2.register: parameters are sharded on several meshes; use one mesh for all")
    if mesh.ndim > 2:
        raise ConfigError(
            f"fsdp2.register: parameters lie on a mesh of {mesh.ndim} dimensions; bucket_moo works with data-parallel "
            "ones only: one (FSDP) or two (HSDP)"
        )
    placements = {parameter.placements for group in groups for parameter in group.parameters}
    if mesh.ndim == 2 and not all(placement[0].is_replicate() for placement in placements):
        raise ConfigError(
            "fsdp2.register: parameters are sharded in both dimensions of their mesh (tensor parallelism); bucket_moo "
            "works with data-parallel meshes only"
        )
    if any(placement[-1].is_replicate() for placement in placements):
        raise ConfigError(
            "fsdp2.register: parameters are replicated, not sharded (replicate), and FSDP2 then calls no "
            "reduce-scatter; use fully_shard, or DDP (bucketmoo_ds.ddp)"
        )
    return mesh


def _exchange(mesh: DeviceMesh, config: BucketMOOConfig) -> tuple[Exchange, dist.ProcessGroup | None]:
    """The exchange of all ranks of the mesh, and the group of this rank's replicas where there are any."""
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ConfigError(
            "fsdp2.register: the mesh's ranks do not ascend, and process groups would reorder them; list them in order"
        )
    if mesh.ndim == 1:
        return create_exchange(config, mesh.get_group()), None
    if mesh.size(1) == 1 < mesh.size(0):
        raise ConfigError(
            "fsdp2.register: the mesh has replicas, but shards nothing, and FSDP2 then calls no reduce-scatter; use a "
            "1-D mesh, or DDP (bucketmoo_ds.ddp)"
        )
    everyone = len(ranks) == dist.get_world_size()
    group: Any = dist.group.WORLD if everyone else dist.new_group(ranks, use_local_synchronization=True)
    if config.ranks_per_node == 0:  # a replica is the natural node
        config = dataclasses.replace(config, ranks_per_node=mesh.size(1))
    return create_exchange(config, group), mesh.get_group(0)


def _plan(model: Any, groups: Sequence[_Group], granularity: str | Refined) -> BlockPlan:
    named = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
    trained = {id(each): Parameter(plain_name(name), each.numel()) for name, each in named}
    index = {identity: position for position, identity in enumerate(trained)}
    for group in groups:
        group.indices = [index[id(parameter)] for parameter in group.parameters]
    return plan_buckets(list(trained.values()), [sorted(group.indices) for group in groups], granularity)


class FSDP2Adapter(Sharded):
    """Takes what FSDP2 would reduce-scatter, bucket by bucket, and writes combined gradients.

    Args:
        model: the root module.
        groups: what it trains, in the plan's order.
        plan, exchange: as in `BucketMOO`.
        replicas: the group of this rank's replicas, where there are any.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[_Group],
        plan: BlockPlan,
        exchange: Exchange,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(plan, exchange)
        self._model = model
        self._groups = groups
        self._replica_group = replicas
        self._replicas = dist.get_world_size(replicas) if replicas is not None else 1
        members = {id(each) for group in groups for each in group.members}
        everything = (each for _, _, own in _own_groups(model) for each in own.fsdp_params)
        self._others = [each for each in everything if id(each) not in members]
        self._trained: list[list[bool]] = []  # by group, in this window
        self._early: dict[int, Tensor] = {}
        self.is_open = True

    def install(self) -> None:
        """Replaces FSDP2's reduction."""
        for bucket, group in enumerate(self._groups):
            module = group.module
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True)
            else:
                _fill_unused(group)
            group.communication = _Communication(self, bucket, empty_output=self._replicas > 1)
            module.set_custom_reduce_scatter(group.communication)
            if self._exchange.world_size == 1:  # FSDP2 then reduces nothing, but still calls this hook
                module.set_all_reduce_hook(functools.partial(self._take_all, bucket))
        self._handles.append(self._model.register_forward_hook(Hook(self._watch)))

    def close(self) -> None:
        """See `Adapter`."""
        super().close()
        self.is_open = False
        for group in self._groups:
            group.watched.clear()

    @property
    def _shards(self) -> int:
        return self._exchange.world_size // self._replicas

    def optimized(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Adapter`."""
        return [parameter for group in self._groups for parameter in group.parameters]

    def obstacle(self, boundary: bool) -> LanguageError | None:
        """See `Adapter`. Ranks may differ in it."""
        if not self.moo.window.once_a_window and not all(group.own.reduce_grads for group in self._groups):
            return LanguageError(
                "set_requires_gradient_sync(False) mixes the languages of a rank's micro-steps: leave it out, or "
                "register with once_a_window=True, which sets it, and keep one language a rank and window"
            )
        if self._model._get_fsdp_state()._is_root is False:
            return LanguageError(
                "fsdp2.register got a module inside of the model that was called, whose other parameters would be "
                "averaged; register the module to which fully_shard was applied last"
            )
        for group in self._groups:
            if group.own._reduce_scatter_comm is not group.communication:
                return LanguageError(
                    "the reduce-scatter was changed after fsdp2.register, which had replaced it; leave out "
                    "set_symm_mem_for_comm, set_allocate_memory_from_process_group_for_comm and "
                    "set_custom_reduce_scatter"
                )
        problem = self._changed_parameters()
        return LanguageError(problem) if problem else None

    def _changed_parameters(self) -> str:
        """What has become of the parameters since register that this window cannot take; empty for nothing. Those of
        the plan may be frozen and unfrozen between windows: FSDP2 leaves them out of its buckets then."""
        unfrozen = [each._param_fqn for each in self._others if each.sharded_param.requires_grad]
        trained = [group.trained for group in self._groups]
        added = sum(parameter.requires_grad for parameter in self._model.parameters()) - sum(map(sum, trained))
        if unfrozen or added:
            what = f'parameter "{unfrozen[0]}" was unfrozen' if unfrozen else f"{added} parameters were added"
            return (
                f"{what} after fsdp2.register, which fixed the blocks; do it before (what is trainable then may be "
                "frozen and unfrozen later)"
            )
        if self.moo.in_window and trained != self._trained:
            return (
                "parameters were frozen or unfrozen between two micro-steps of a window; do it after optimizer.step()"
            )
        self._trained = trained
        return _hooked((each._param_fqn, each.sharded_param) for group in self._groups for each in group.members)

    def begin(self) -> None:
        """See `Adapter`."""
        if self.moo.window.once_a_window:
            self._model.set_requires_gradient_sync(self.micro.boundary)
        if self._replicas > 1:
            self._model.set_requires_all_reduce(False)
        super().begin()
        early, self._early = self._early, {}
        for bucket, flat in early.items():
            self.take(bucket, flat)

    def nothing_came(self) -> None:
        """See `Adapter`. FSDP2 has reduced the zeros that it fills in all the same."""
        self._early.clear()

    @torch.compiler.disable
    def _watch(self, *_: Any) -> None:
        """Hooks the unsharded parameters, which are there after the first forward pass, and stay. FSDP2 tells nobody
        else of a gradient that it does not reduce, and nothing else can scale one before it is added up."""
        for group in self._groups:
            for each in group.members:
                there = hasattr(each, "_unsharded_param") and each._unsharded_param.requires_grad
                if there and id(each) not in group.watched:
                    group.watched.add(id(each))
                    self._handles.append(each._unsharded_param.register_hook(self.scaled))

    def take(self, bucket: int, flat: Tensor) -> None:
        """Takes a bucket's gradient, `[S * s]` for S shards, and hands buckets to the engine in the agreed order.

        Raises:
            BucketMOOError: the bucket's size has changed, or it comes a second time.
        """
        if not self.micro.is_open and self._groups[bucket].is_watched:  # zeros, of parameters that were not used
            self._early[bucket] = flat
            return
        self.arrive()
        group = self._groups[bucket]
        expected = self._shards * group.shard_numel
        if not all(group.trained):
            flat = self._with_frozen(group, flat)
        if flat.numel() != expected:
            raise BucketMOOError(
                f"{self._plan.buckets[bucket].name}: FSDP2 reduces {flat.numel()} elements, {expected} were there at "
                "register; leave out set_reduce_scatter_unused_params, and freeze parameters between two windows"
            )
        twice = "a module that is called twice does that); apply fully_shard to a module that contains all its calls"
        self.put(bucket, flat, twice)

    def _with_frozen(self, group: _Group, flat: Tensor) -> Tensor:
        """Returns a bucket that FSDP2 has filled without frozen parameters, with zeros in their places."""
        sizes = [padded if trained else 0 for padded, trained in zip(group.padded, group.trained, strict=True)]
        if flat.numel() != self._shards * sum(sizes):
            return flat
        parts = flat.view(self._shards, -1).split(sizes, dim=1)
        places = zip(parts, group.padded, strict=True)
        return torch.cat([nn.functional.pad(part, (0, padded - part.size(1))) for part, padded in places], 1).view(-1)

    def _take_all(self, bucket: int, gradient: Tensor) -> None:
        """One rank alone: the gradient will be `.grad`, to which the combined one must not be added."""
        self.take(bucket, gradient.clone())
        gradient.zero_()

    def absent(self, bucket: int) -> Tensor:
        """See `Sharded`. No forward pass has ever come there, or all its parameters are frozen."""
        group = self._groups[bucket]
        if any(group.trained) and not group.unused:
            raise BucketMOOError(
                f"{self._plan.buckets[bucket].name}: FSDP2 did not reduce it in this backward; leave out "
                "set_requires_gradient_sync and set_reduce_scatter_unused_params after fsdp2.register"
            )
        device = torch.device(group.mesh.device_type)
        return torch.zeros(self._shards * group.shard_numel, dtype=group.wire_dtype, device=device)

    def by_rank(self, bucket: int, flat: Tensor) -> Tensor:
        """See `Sharded`. The shards are cut into one piece a replica: piece (replica, shard) is the one of that rank of
        the mesh."""
        if self._replicas == 1:
            return flat
        shard, piece = self._groups[bucket].shard_numel, self._piece_numel(bucket)
        pieces = flat.new_zeros(self._replicas, self._shards, piece)
        shards = flat.view(self._shards, shard)
        for replica in range(self._replicas):
            part = shards[:, replica * piece : (replica + 1) * piece]
            pieces[replica, :, : part.size(1)] = part
        return pieces.view(-1)

    def end(self) -> list[bool]:
        """See `Adapter`. A parameter without a gradient counts as a gradient of zeros; ranks must freeze the same."""
        if self.micro.exchanges:
            self._release.finish()
        else:
            for group in self._groups:
                group.fill_accumulated()
        trained = [False] * len(self._plan.parameters)
        for group in self._groups:
            for index, now in zip(group.indices, group.trained, strict=True):
                trained[index] = now
        return trained

    def gather(self, bucket: int, shard: Tensor) -> Received | None:
        """See `Sharded`."""
        return self._exchange.all_gather(shard, self._replica_group) if self._replicas > 1 else None

    def abandon(self) -> None:
        """See `Adapter`."""
        super().abandon()
        self._early.clear()
        for group in self._groups:
            group.drop_gradients()

    @torch.no_grad()
    def write_shard(self, bucket: int, shard: Tensor) -> None:
        """See `Sharded`."""
        group = self._groups[bucket]
        if group.own._post_reduce_event is not None and shard.device.type != "cpu":  # FSDP2 is making `.grad`
            stream_of(shard).wait_event(group.own._post_reduce_event)
        start = 0
        for parameter, padded in zip(group.parameters, group.padded, strict=True):
            if not parameter.requires_grad:  # frozen: the optimizer is to leave it alone
                parameter.grad = None
                start += padded
                continue
            if parameter.grad is None:  # FSDP2 makes none of what no forward pass has come to, and with replicas
                parameter.grad = torch.empty_like(parameter)
            local = parameter.grad.to_local()
            local.copy_(shard.narrow(0, start, local.numel()).view_as(local))
            start += padded

    def _piece_numel(self, bucket: int) -> int:
        return -(-self._groups[bucket].shard_numel // self._replicas)

    def segments(self, bucket: int) -> Segments:
        """Returns the segments of this rank's piece of a bucket."""
        group = self._groups[bucket]
        starts = itertools.accumulate(group.padded, initial=0)
        runs = [Run(*run) for run in zip(group.indices, starts, group.padded, strict=False)]
        piece, replica = self._piece_numel(bucket), self._exchange.rank // self._shards
        return self._plan.segments_of(bucket, runs, replica * piece, (replica + 1) * piece)


def _fill_unused(group: _Group) -> None:
    """Does what `set_reduce_scatter_unused_params(True)` does from torch 2.13 on: a parameter that was not used has a
    gradient of zeros. Before, FSDP2 leaves it out of the bucket. A group of several modules comes here once for each of
    them then; what it has had is had once a backward."""
    plain: Any = group.own.post_backward
    filled: int | None = None  # the backward that was filled in last

    def post_backward(*arguments: Any) -> None:
        nonlocal filled
        backward = graph_task()
        reduces, filled = group.own.reduce_grads and (backward is None or backward != filled), backward
        for each in group.members if reduces else ():
            if hasattr(each, "_unsharded_param") and each.unsharded_accumulated_grad is None:
                unsharded = each._unsharded_param
                if unsharded.grad is None and unsharded.requires_grad:
                    unsharded.grad = torch.zeros_like(unsharded)
        plain(*arguments)

    group.own.post_backward = post_backward


class _Communication(ReduceScatter):
    """What FSDP2 calls in place of its reduce-scatter of one bucket."""

    def __init__(self, adapter: FSDP2Adapter, bucket: int, empty_output: bool) -> None:
        self._adapter = adapter
        self._bucket = bucket
        self._empty_output = empty_output
        self._is_output = False

    @property
    def is_open(self) -> bool:
        """Whether its session is not closed."""
        return self._adapter.is_open

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Called for the input, then for the output; with replicas FSDP2 only keeps the latter."""
        size = (0,) if self._is_output and self._empty_output else tuple(size)
        self._is_output = not self._is_output
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Hands the input over. The output becomes `.grad`, where the combined gradient is written later."""
        output_tensor.zero_()
        self._adapter.take(self._bucket, input_tensor)
