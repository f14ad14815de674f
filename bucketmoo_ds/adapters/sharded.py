"""Wrappers that hand over a bucket whole, and keep each rank's shard of it: what the adapters of FSDP1 and FSDP2 share.

Buckets go to the engine in an agreed order. Combined shards are written where the wrapper keeps gradients: at once, or
when backward is over, where the wrapper has not made `.grad` yet or all ranks gather the shards first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.adapters.release import Release
from bucketmoo_ds.adapters.session import Adapter
from bucketmoo_ds.comm.delivery import Deliveries
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import BlockPlan, Segments


class Sharded(Adapter):
    """Takes buckets, and writes combined shards.

    Args:
        plan, exchange: as in `BucketMOO`.
    """

    def __init__(self, plan: BlockPlan, exchange: Exchange) -> None:
        self._plan = plan
        self._exchange = exchange
        self._arrived: dict[int, tuple[Tensor, Any]] = {}
        self._deliveries = Deliveries()
        self._release = Release(len(plan.buckets), exchange, self._leave)
        self._handles: list[Any] = []

    def make_pipeline(
        self,
        config: BucketMOOConfig,
        micro_steps: int,
        once_a_window: bool,
        device: torch.device,
        result_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes the pipeline; see `BucketMOO`."""
        self.moo = BucketMOO(
            config,
            self._plan,
            self._exchange,
            self.deliver,
            micro_steps=lambda: micro_steps,
            once_a_window=once_a_window and micro_steps > 1,
            segments=[self.segments(bucket) for bucket in range(len(self._plan.buckets))],
            result_dtype=result_dtype,
            overlap=True,
            device=device,
        )

    def segments(self, bucket: int) -> Segments:
        """Returns the segments of this rank's shard of a bucket."""
        raise NotImplementedError

    def absent(self, bucket: int) -> Tensor:
        """Returns the zeros that stand for a bucket that the wrapper has not handed over."""
        raise NotImplementedError

    def write_shard(self, bucket: int, combined: Tensor) -> None:
        """Writes a combined shard, or what was gathered of it, into `.grad`."""
        raise NotImplementedError

    def gather(self, bucket: int, shard: Tensor) -> Received | None:
        """Starts gathering a bucket's combined shards, where this rank keeps more than its own."""
        return None

    def close(self) -> None:
        """See `Adapter`."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """See `Adapter`."""
        self._arrived.clear()
        self._release.start()

    def scaled(self, gradient: Tensor) -> Tensor | None:
        """A hook of a parameter that the wrapper adds up: the first gradient opens the micro-step, and each counts as
        its tokens do before it is added to others."""
        self.arrive()
        factor = self.micro.factor
        if factor == 1.0:
            return None
        return gradient * factor if factor else torch.zeros_like(gradient)

    def put(self, bucket: int, flat: Tensor, twice: str) -> None:
        """Takes a bucket's gradient, `[W * S]`.

        Args:
            twice: what brings a bucket a second time, and the way out.

        Raises:
            BucketMOOError: the bucket comes a second time.
        """
        if self._release.is_complete(bucket):
            name = self._plan.buckets[bucket].name
            raise BucketMOOError(
                f"{name}: got a second gradient in one backward, after the first was exchanged ({twice}"
            )
        made = stream_of(flat).record_event() if flat.device.type != "cpu" else None
        self._arrived[bucket] = flat, made
        self._release.complete(bucket)

    def deliver(self, bucket: int, shard: Tensor) -> None:
        """The engine's sink."""
        gathered = self.gather(bucket, shard)
        if gathered is not None:
            self._deliveries.start(bucket, gathered)
        elif bucket == self._release.inside:  # the wrapper has not made its `.grad` yet, and will add zeros
            self._deliveries.start(bucket, Received(shard))
        else:
            self.write_shard(bucket, shard)

    def write(self) -> None:
        """See `Adapter`."""
        self._deliveries.finish(self.write_shard)

    def abandon(self) -> None:
        """See `Adapter`."""
        self._arrived.clear()
        self._release.start()
        self._deliveries.clear()

    def by_rank(self, bucket: int, flat: Tensor) -> Tensor:
        """Returns the gradient of a bucket in the order of the exchange's ranks."""
        return flat

    def _leave(self, bucket: int) -> None:
        flat, made = self._arrived.pop(bucket, None) or (self.absent(bucket), None)
        if made is not None:  # maybe on another stream of the wrapper's
            stream_of(flat).wait_event(made)
        self.moo.ingest(bucket, self.by_rank(bucket, flat))


def stream_of(tensor: Tensor) -> Any:
    """Returns the current stream of an accelerator that a tensor lies on."""
    return torch.get_device_module(tensor.device).current_stream(tensor.device)
