"""DDP: `register(model, config)` after wrapping, built on `register_comm_hook`.

Read in torch 2.13.0, `torch/nn/parallel/distributed.py` and its reducer. DDP's own buckets are exchanged as they are,
and the combined gradient is gathered into the same memory, before DDP makes `.grad` of it. DDP fills its buckets anew
after its first backward, in the order in which gradients came in that. Blocks must not depend on it: so DDP is made to
fill them at register, in the order of the model reversed. With `find_unused_parameters` it never fills them anew.

With W ranks and N bytes of gradients a rank sends (W-1)/W N in each exchange, and once a window (W-1)/W N of combined
ones. DDP's own all-reduce sends 2 (W-1)/W N in every micro-step.
"""

# No postponed annotations here: DDP compares the hook's own with the types.

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from bucketmoo_ds.adapters.hooks import BeforeAccumulation, Hook, queue_callback
from bucketmoo_ds.adapters.session import Session, unwrapped
from bucketmoo_ds.adapters.sharded import Sharded
from bucketmoo_ds.adapters.whole import Registered, check_taken
from bucketmoo_ds.comm.exchange import Received
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.plan.blocks import Run, Segments, granularity_of, plan_buckets
from bucketmoo_ds.plan.choices import create_exchange

CommHook = Callable[[Session, dist.GradBucket], Future[Tensor]]


def register(
    model: DistributedDataParallel,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> Session:
    """Makes DDP resolve the conflicts of a model's languages inside its gradient reduction.

    Call it on all ranks, after wrapping and before the first forward pass. Every micro-batch then names its language:
    by an entry of the batch (`config.language_key`), or inside `with session.language("de"):`. Divide the loss by
    `micro_steps` as usual. When the last backward of a window returns, `.grad` holds the combined gradient; after the
    ones before it, nothing, or with `once_a_window` this rank's sum.

    A bucket is one of DDP's: its `bucket_cap_mb` sets the size.

    Memory, on top of DDP's own: the rows, `K P / W` elements for P trained ones (none while streaming), and what
    arrives of the buckets in flight, a few.

    Args:
        model: the `DistributedDataParallel` module.
        config: the settings.
        micro_steps: M, backward passes between two optimizer steps.
        once_a_window: whether each rank adds up its micro-steps and exchanges them at the boundary: fewer bytes, and
            each rank keeps one language for the window. The micro-steps before the boundary may run under
            `model.no_sync()`; they need not, and under `static_graph` must not: their gradients stay here either way.
        on_nonfinite: see `Session`.

    Returns:
        The session: `session.last` is the latest window's resolution.

    Raises:
        ConfigError: the model, or a setting of DDP, does not allow it; the message says what does.
    """
    session, hook = comm_hook(
        model, config, micro_steps=micro_steps, once_a_window=once_a_window, on_nonfinite=on_nonfinite
    )
    unwrapped(model).register_comm_hook(session, hook)
    return session


def comm_hook(
    model: DistributedDataParallel,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> tuple[Session, CommHook]:
    """Returns what `model.register_comm_hook` takes: the session, and the hook. See `register`."""
    ddp = unwrapped(model)
    _refuse(ddp)
    adapter = DDPAdapter(ddp, config, micro_steps, once_a_window)
    session = Session(model, config, adapter, on_nonfinite)
    return session, _CommHook(adapter.reduce)


def _refuse(model: DistributedDataParallel) -> None:
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"ddp.register: {type(model).__name__} is no DistributedDataParallel module; wrap the model first, or use "
            "bucketmoo_ds.single for one process alone"
        )
    if model._use_python_reducer:
        raise ConfigError(
            'ddp.register: torch._dynamo.config.optimize_ddp = "python_reducer" replaces DDP\'s buckets; leave it out '
            "(the default compiles bucket by bucket)"
        )
    if model.mixed_precision is not None:
        raise ConfigError(
            "ddp.register: mixed_precision reduces gradients by a communication hook of its own; use torch.autocast, "
            "or convert the model to bfloat16 before wrapping it"
        )
    trained = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    ignored = [name for name in trained if name in model.parameters_to_ignore]
    if ignored:
        raise ConfigError(
            f'ddp.register: DDP does not reduce parameter "{ignored[0]}" ({len(ignored)} in all), which is trained '
            "(_set_params_and_buffers_to_ignore_for_model, delay_all_reduce_named_params); leave that out, or freeze it"
        )
    hook = model._get_ddp_logging_data().get("comm_hook")
    if hook:
        raise ConfigError(
            f"ddp.register: the model has a communication hook already ({hook}), and DDP takes one; leave it out"
        )


class _CommHook(Hook):
    """What DDP calls in place of its all-reduce of a bucket; DDP asks for its name, parameters and their types."""

    def __init__(self, call: Callable[..., Future[Tensor]]) -> None:
        super().__init__(call)
        self.__name__ = self.__qualname__ = "bucketmoo_ds.ddp"

    def __call__(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """See `DDPAdapter.reduce`."""
        future: Future[Tensor] = self._call(bucket)
        return future


class DDPAdapter(Registered, Sharded):
    """Takes what DDP would all-reduce, and writes the combined gradient in its place."""

    def __init__(
        self, model: DistributedDataParallel, config: BucketMOOConfig, micro_steps: int, once_a_window: bool
    ) -> None:
        Registered.__init__(self, "ddp.register", model.module)
        self._ddp = model
        self._runs: list[list[Run]] = []  # of each bucket: where its parameters lie in it
        self._empty: list[Tensor] = []  # what the buckets look like
        for bucket in _settled_buckets(model):
            numels = [parameter.numel() for parameter in bucket]
            starts = itertools.accumulate(numels, initial=0)
            members = [self._index[parameter] for parameter in bucket]
            self._runs.append([Run(*run) for run in zip(members, starts, numels, strict=False)])
            self._empty.append(torch.empty(sum(numels), dtype=bucket[0].dtype, device="meta"))
        self._delays = model.static_graph  # in its first backward
        group: Any = model.process_group
        buckets = [sorted(run.parameter for run in runs) for runs in self._runs]
        plan = plan_buckets(self._sizes, buckets, granularity_of(config))
        Sharded.__init__(self, plan, create_exchange(config, group))
        self._reduces, self._joins = True, False
        self._used: set[int] = set()
        self._start()
        self._handles.append(BeforeAccumulation(self.parameters, self.scaled))
        self.make_pipeline(config, micro_steps, once_a_window, self._device, self._dtype)

    def segments(self, bucket: int) -> Segments:
        """See `Sharded`."""
        shard = self._exchange.shard_numel(self._empty[bucket].numel())
        start = self._exchange.rank * shard
        return self._plan.segments_of(bucket, self._runs[bucket], start, start + shard)

    def before_forward(self) -> None:
        """See `Adapter`. DDP decides in the forward pass what its backward will reduce."""
        self._reduces = self._ddp.require_backward_grad_sync
        self._joins = self._ddp._join_config.enable

    def obstacle(self, boundary: bool) -> LanguageError | None:
        """See `Adapter`. Found out before anything is exchanged, for ranks may differ in it."""
        if self._joins:
            return LanguageError(
                "DDP's join(): a rank without data would take no part in resolving; give all ranks equally many "
                "micro-batches (LanguageBatchSampler does) and leave join() out"
            )
        frozen = [each.name for each, own in zip(self._sizes, self.parameters, strict=True) if not own.requires_grad]
        if frozen and not (self._ddp.find_unused_parameters and not self._ddp.static_graph):
            return LanguageError(
                f'parameter "{frozen[0]}" ({len(frozen)} in all) was frozen after ddp.register, and DDP waits for its '
                "gradient: wrap the model with find_unused_parameters=True, or freeze before wrapping"
            )
        if not self._reduces and (boundary or not self.moo.window.once_a_window):
            return LanguageError(
                "the forward pass ran under no_sync(), which would mix the languages of a rank's micro-steps: leave it "
                "out, or register with once_a_window=True, keep one language a rank and window, and use no_sync() for "
                "all micro-steps but the last"
            )
        return None

    def begin(self) -> None:
        """See `Adapter`."""
        super().begin()
        self._start()
        if self.micro.first:
            self._used.clear()
            self._clear_gradients()

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Takes a bucket of DDP's; what it returns is done when the bucket holds what is to be `.grad`.

        DDP waits for that when backward is over, in a callback that it queues when the hook of the last bucket has
        returned. What is left to do for it is queued there, just before. In the first backward of a static graph it
        hands over all buckets then, as if they were the first, and waits at once.
        """
        self.arrive()
        buffer, number = bucket.buffer(), len(self._futures)
        future: Future[Tensor] = Future(devices=[] if self._device.type == "cpu" else [self._device])
        self._futures.append((future, buffer))
        if self.micro.exchanges:
            self.put(number, buffer, "DDP should not do that)")
        if len(self._futures) < len(self._runs):
            return future
        if self._delays:
            self._before_ddp()
        else:
            queue_callback(self._before_ddp)
        return future

    def by_rank(self, bucket: int, flat: Tensor) -> Tensor:
        """See `Sharded`. A bucket that W slices of whole eights do not fill is copied."""
        size = self._exchange.world_size * self._exchange.shard_numel(flat.numel())
        return flat if size == flat.numel() else torch.nn.functional.pad(flat, (0, size - flat.numel()))

    def absent(self, bucket: int) -> Tensor:
        """See `Sharded`."""
        return torch.zeros_like(self._empty[bucket], device=self._device)

    def gather(self, bucket: int, shard: Tensor) -> Received:
        """See `Sharded`. Into DDP's own memory, which has been sent by now."""
        buffer = self._buffer(bucket)
        fits = buffer.numel() == self._exchange.world_size * shard.numel()
        return self._exchange.all_gather(shard.to(buffer.dtype), out=buffer if fits else None)

    def write_shard(self, bucket: int, combined: Tensor) -> None:
        """See `Sharded`."""
        buffer = self._buffer(bucket)
        if combined is not buffer:
            buffer.copy_(combined[: buffer.numel()])

    def end(self) -> list[bool]:
        """See `Adapter`. DDP fills up with zeros what a rank did not use, so that all ranks have all gradients.

        Raises:
            BucketMOOError: gradients took another way.
        """
        came = not self._reduces or len(self._futures) == len(self._runs)
        check_taken(self._model, self._index if came else ())
        if self.micro.exchanges:
            self._release.finish()
        return [True] * len(self.parameters)

    def abandon(self) -> None:
        """See `Adapter`."""
        super().abandon()
        self._start()

    def _start(self) -> None:
        self._futures: list[tuple[Future[Tensor], Tensor]] = []  # with the bucket's memory, in the order of the plan

    def _buffer(self, bucket: int) -> Tensor:
        return self._futures[bucket][1] if bucket < len(self._futures) else self.absent(bucket)

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _before_ddp(self) -> None:
        self._delays = False
        queue_callback(self._after_ddp)
        try:
            self.settle()
        finally:
            for future, buffer in self._futures:
                future.set_result(buffer)

    def _after_ddp(self) -> None:
        """DDP has made `.grad` of its buckets, but for parameters that no rank has used in this micro-step."""
        if self.micro.exchanges:
            came = {index for index, parameter in enumerate(self.parameters) if parameter.grad is not None}
            if self.micro.boundary:
                self._make_up(self._used - came if not self.moo.window.once_a_window else came)
            else:
                self._used |= came
                self._clear_gradients()
        self.spoil()

    def _make_up(self, missed: set[int]) -> None:
        """With `find_unused_parameters` DDP leaves alone what no rank has used in the last micro-step, though one may
        have in an earlier one."""
        if self._ddp.static_graph or not self._ddp.find_unused_parameters:
            return
        for (_, buffer), runs in zip(self._futures, self._runs, strict=True):
            for run in runs:
                if run.parameter in missed:
                    parameter = self.parameters[run.parameter]
                    strides = torch.empty_like(parameter, device="meta").stride()
                    combined = buffer[run.start :].as_strided(parameter.shape, strides)
                    parameter.grad = combined if self._ddp.gradient_as_bucket_view else combined.clone()


def _settled_buckets(model: DistributedDataParallel) -> list[list[Tensor]]:
    """Makes DDP's reducer anew, as `__setstate__` does; returns the parameters of each bucket that it keeps.

    Where it would fill its buckets once more after the first backward, in the order of that, it does so now, in the
    order of its list: the model's reversed.
    """
    parameters, sparse = model._build_params_for_reducer()
    fills = model.static_graph or not model.find_unused_parameters
    if fills:
        parameters, sparse = parameters[::-1], sparse[::-1]
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    if model.static_graph:
        assert model.logger is not None
        model.reducer._set_static_graph()
        model.logger._set_static_graph()
    if fills:
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()
    return [bucket.parameters() for bucket in model.reducer._get_zeros_like_grad_buckets()]
