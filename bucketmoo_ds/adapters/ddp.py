"""DDP: `register(model, config)` after wrapping, built on `register_comm_hook`.

Read in torch 2.13.0, `torch/nn/parallel/distributed.py` and its reducer. DDP calls the hook for each of its buckets and
rebuilds these after the first backward. So gradients are copied out of them, parameter by parameter, into the plan's
own static buckets, which are exchanged while backward goes on. Before the boundary DDP is handed zeros, which make
`.grad`: the next micro-step's gradient is added to them before DDP hands it over. At the boundary the combined gradient
becomes `.grad` when DDP has done with it, but backward has not returned; so it reaches clipping and the optimizer. With
`gradient_as_bucket_view` it is written into the view of DDP's bucket that `.grad` stays.

With W ranks and N bytes of gradients a rank sends (W-1)/W N in each exchange, and once a window (W-1)/W N of combined
ones. DDP's own all-reduce sends 2 (W-1)/W N in every micro-step.
"""

# No postponed annotations here: DDP compares the hook's own with the types.

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from bucketmoo_ds.adapters.hooks import Hook
from bucketmoo_ds.adapters.session import Session, unwrapped
from bucketmoo_ds.adapters.whole import Whole
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.plan.choices import create_exchange

CommHook = Callable[[Session, dist.GradBucket], Future[Tensor]]


def register(
    model: DistributedDataParallel,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    bucket_size: int | None = None,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> Session:
    """Makes DDP resolve the conflicts of a model's languages inside its gradient reduction.

    Call it on all ranks, after wrapping and before the first forward pass. Every micro-batch then names its language:
    by an entry of the batch (`config.language_key`), or inside `with session.language("de"):`. Divide the loss by
    `micro_steps` as usual. When the last backward of a window returns, `.grad` holds the combined gradient; after the
    ones before it, zeros.

    Memory, on top of DDP's own: the rows, `K P / W` elements for P trained ones (none while streaming); the buckets in
    flight, a few; and the combined gradient, P elements of the parameters' dtype, until it is in `.grad`.

    Args:
        model: the `DistributedDataParallel` module.
        config: the settings.
        micro_steps: M, backward passes between two optimizer steps.
        bucket_size: elements of a bucket of ours, whatever DDP's are; left out, what DDP's `bucket_cap_mb` allows.
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
        model,
        config,
        micro_steps=micro_steps,
        bucket_size=bucket_size,
        once_a_window=once_a_window,
        on_nonfinite=on_nonfinite,
    )
    unwrapped(model).register_comm_hook(session, hook)
    return session


def comm_hook(
    model: DistributedDataParallel,
    config: BucketMOOConfig,
    *,
    micro_steps: int = 1,
    bucket_size: int | None = None,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
) -> tuple[Session, CommHook]:
    """Returns what `model.register_comm_hook` takes: the session, and the hook. See `register`."""
    ddp = unwrapped(model)
    _refuse(ddp)
    group: Any = ddp.process_group
    adapter = DDPAdapter(
        "ddp.register",
        ddp.module,
        config,
        create_exchange(config, group),
        micro_steps=lambda: micro_steps,
        once_a_window=once_a_window and micro_steps > 1,
        bucket_size=bucket_size,
        bucket_bytes=ddp.bucket_bytes_cap,
    )
    session = Session(model, config, adapter, on_nonfinite)
    adapter.install(ddp)
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

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__(call)
        self.__name__ = self.__qualname__ = "bucketmoo_ds.ddp"

    def __call__(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """See `DDPAdapter.reduce`."""
        done: Future[Tensor] = Future()
        done.set_result(self._call(bucket))
        return done


class DDPAdapter(Whole):
    """Takes what DDP would all-reduce, and writes combined gradients."""

    learns = False  # in the first backward DDP hands over buckets that it has not ordered yet

    def install(self, model: DistributedDataParallel) -> None:
        """Hooks the parameters."""
        self._ddp = model
        self._reduces, self._joins = True, False
        self.hook(self._note)

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
        if not self._reduces and (boundary or not self.moo.window.once_a_window):
            return LanguageError(
                "the forward pass ran under no_sync(), which would mix the languages of a rank's micro-steps: leave it "
                "out, or register with once_a_window=True, keep one language a rank and window, and use no_sync() for "
                "all micro-steps but the last"
            )
        return None

    def _note(self, parameter: Tensor) -> None:
        """A gradient is there. DDP hands it over with its bucket; under `no_sync` it does not, and it is taken here."""
        self.arrive(parameter)
        if not self._reduces:
            assert parameter.grad is not None
            self.take(parameter, parameter.grad)
            parameter.grad = None

    def reduce(self, bucket: dist.GradBucket) -> Tensor:
        """Takes a bucket of DDP's; `.grad` becomes what it returns."""
        self.arrive()
        buffer = bucket.buffer()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter.requires_grad:  # or it was frozen after it was wrapped
                self.take(parameter, gradient)
        if not self.micro.boundary:
            buffer.zero_()
        return buffer

    def end(self) -> list[bool]:
        """See `Adapter`. DDP fills up with zeros what a rank did not use, so that all ranks have all gradients."""
        super().end()
        return [True] * len(self.parameters)

    def assign(self, index: int, combined: Tensor) -> None:
        """See `Whole`. What no rank used has no gradient, as without us."""
        parameter = self.parameters[index]
        if parameter.grad is None:
            return
        if self._as_views:
            parameter.grad.copy_(combined)
        else:
            parameter.grad = combined.to(parameter.dtype)

    @property
    def _as_views(self) -> bool:
        return bool(self._ddp.gradient_as_bucket_view)
