"""The order in which two streams wait for each other, on a device that notes what is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bucketmoo_ds.comm.streams import SideStream

DEVICE = torch.device("cuda", 0)


class FakeDevice:
    """What `torch.cuda` is asked for, with two streams: the caller's, and the one that is made."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []
        self.current = "caller's"

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 (torch's name)
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
        return SimpleNamespace(name=name, wait_stream=lambda other: self.events.append((name, "waits for", other.name)))


class FakeTensor:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record_stream(self, stream: Any) -> None:
        self.device.events.append(("recorded on", stream.name))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def test_the_stream_waits_for_what_was_queued_and_the_caller_for_it(device: FakeDevice) -> None:
    side: Any = SideStream(DEVICE, device)  # type: ignore[arg-type]
    with side.after_current(FakeTensor(device)):
        device.events.append(("work on", device.current))
    device.events.append(("work on", device.current))
    side.join()
    assert device.events == [
        ("own", "waits for", "caller's"),
        ("recorded on", "own"),
        ("work on", "own"),
        ("work on", "caller's"),
        ("caller's", "waits for", "own"),
    ]


def test_an_error_gives_the_callers_stream_back(device: FakeDevice) -> None:
    side = SideStream(DEVICE, device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within"), side.after_current():
        raise ValueError("within")
    assert device.current == "caller's"


def test_on_the_cpu_there_is_none() -> None:
    side = SideStream(torch.device("cpu"))
    with side.after_current(torch.zeros(3)):
        pass
    side.join()
