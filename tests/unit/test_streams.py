"""The order in which two streams wait for each other, on a device that notes what is asked of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.comm.streams import SideStream
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks

DEVICE = torch.device("cuda", 0)


class FakeDevice:
    """What `torch.cuda` is asked for, with two streams: the caller's, and the one that is made."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []
        self.current = "caller's"
        self.passed = False

    def Stream(self, device: torch.device, priority: int = 0) -> Any:  # noqa: N802 (torch's name)
        assert priority == -1
        return self._named("own")

    def current_stream(self, device: torch.device) -> Any:
        return self._named(self.current)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def _named(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.events.append((name, "waits for", other.name)),
            record_event=lambda: SimpleNamespace(query=lambda: self.passed),
        )


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def side(device: FakeDevice) -> Any:
    return SideStream(DEVICE, device)  # type: ignore[arg-type]


def test_it_waits_for_the_caller_when_told_to_and_the_caller_for_it(device: FakeDevice, side: Any) -> None:
    with side.beside():
        device.events.append(("work on", device.current))
    device.events.append(("work on", device.current))
    side.follow()
    side.join()
    assert device.events == [
        ("work on", "own"),
        ("work on", "caller's"),
        ("own", "waits for", "caller's"),
        ("caller's", "waits for", "own"),
    ]


def test_an_error_gives_the_callers_stream_back(device: FakeDevice, side: Any) -> None:
    with pytest.raises(ValueError, match="within"), side.beside():
        raise ValueError("within")
    assert device.current == "caller's"


def test_what_it_reads_is_kept_until_it_has_passed(device: FakeDevice, side: Any) -> None:
    tensors = [torch.zeros(3) for _ in range(4)]
    alive = [weakref.ref(tensor) for tensor in tensors]
    side.keep(tensors.pop(0))
    side.keep(tensors.pop(0))
    assert [each() is not None for each in alive[:2]] == [True, True]
    device.passed = True
    side.keep(tensors.pop(0))
    assert [each() is not None for each in alive[:3]] == [False, False, True]
    side.join()
    assert alive[2]() is None


def test_on_the_cpu_there_is_none() -> None:
    side = SideStream(torch.device("cpu"))
    with side.beside():
        side.keep(torch.zeros(3))
    side.follow()
    side.join()


class Note:
    """A tensor's exchange, which notes when its stream is made to wait for it."""

    def __init__(self, device: FakeDevice, bucket: int) -> None:
        self.device, self.bucket = device, bucket

    def wait(self) -> None:
        self.device.events.append((self.device.current, "waits for bucket", str(self.bucket)))


@pytest.mark.parametrize("streaming", [True, False])
def test_an_older_bucket_is_received_beside_the_newer_ones_backward(device: FakeDevice, streaming: bool) -> None:
    """Whatever the order of the buckets: each is sent from the caller's stream, and the older one is received on the
    other, which waits for its exchange alone, and for the caller only where a micro-step begins and ends."""
    config = BucketMOOConfig(languages=["de", "fr"], mode="streaming" if streaming else "deferred", backend="reference")
    plan = plan_blocks([Parameter(f"p{index}", 40) for index in range(3)], 40, "bucket")
    moo = BucketMOO(config, plan, Exchange(), lambda *_: None, micro_steps=lambda: 1, once_a_window=False, overlap=True)
    moo._side = SideStream(DEVICE, device)  # type: ignore[arg-type]
    sent: list[int] = []

    def scatter(flat: torch.Tensor) -> Received:
        device.events.append((device.current, "sends bucket", str(sent[-1])))
        return Received(flat.view(1, -1), Note(device, sent[-1]), (flat,))  # type: ignore[arg-type]

    moo.exchange.scatter = scatter  # type: ignore[method-assign]
    moo.begin_micro_step(Slot(0, 5, 5.0), True)
    for bucket in (1, 0, 2):
        sent.append(bucket)
        moo.ingest(bucket, torch.randn(moo.exchange.shard_numel(40)))
    moo.end_micro_step([True] * 3)
    moo.finish()
    mine, own = "caller's", "own"
    follows = (own, "waits for", mine)
    assert device.events == [
        follows,
        (mine, "sends bucket", "1"),
        (mine, "sends bucket", "0"),
        (own, "waits for bucket", "1"),
        (mine, "sends bucket", "2"),
        (own, "waits for bucket", "0"),
        follows,
        (own, "waits for bucket", "2"),
        (mine, "waits for", own),  # before the next micro-step writes where the buckets lay
        follows,
        (mine, "waits for", own),
    ]
