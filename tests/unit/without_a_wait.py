"""How often a window makes the host wait for the device, and what it queues there, on a device that counts.

Ranks all send what this one sends, so that any number of them fits into one process. The host waits once a window:
`finish` reads what was decided.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.fake_device import DEVICE, Event, FakeDevice, OnDevice, install

from bucketmoo_ds import transfer
from bucketmoo_ds.aggregate import names
from bucketmoo_ds.comm.exchange import Exchange, Received
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import Entries, LanguageTracker, Slot
from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.data.rows import rows_of
from bucketmoo_ds.errors import LanguageError
from bucketmoo_ds.pipeline import engine, store
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks

install()

NUMEL, LANGUAGES = 96, 4
AGGREGATORS = tuple(name for name in names() if name not in ("anchor", "static"))


class Echo(Exchange):
    """W ranks that all send what this one sends.

    Attributes:
        collectives: by operation; those of the control group go from host to host, and are left out.
    """

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size
        self.ranks_per_node = self.nodes = 1
        self.collectives: collections.Counter[str] = collections.Counter()

    def scatter(self, flat: Tensor) -> Received:
        self.collectives["rows"] += 1
        return Received(flat.view(self.world_size, -1)[:1].expand(self.world_size, -1).contiguous())

    def all_gather_grams(self, own: Tensor) -> Tensor:
        self.collectives["Grams"] += 1
        return own.expand(self.world_size, *own.shape).contiguous()

    def all_to_all_grams(self, parts: Tensor) -> Tensor:
        self.collectives["Grams"] += 1
        return parts[:1].expand_as(parts).contiguous()

    def _gather(self, mine: Tensor) -> list[Tensor]:
        return [mine] * self.world_size


def make(exchange: Exchange, micro_steps: int = 1, buckets: int = 7, **changes: Any) -> BucketMOO:
    parameters = [Parameter(f"layers.{index}.weight", NUMEL) for index in range(buckets)]
    names = [f"l{index}" for index in range(LANGUAGES)]
    config = BucketMOOConfig(**{"languages": names, "backend": "reference"} | changes)
    plan = plan_blocks(parameters, NUMEL, config.granularity)
    return BucketMOO(
        config, plan, exchange, lambda bucket, shard: None, micro_steps=lambda: micro_steps, once_a_window=False,
        overlap=True, device=DEVICE,
    )  # fmt: skip


def run_window(moo: BucketMOO, micro_steps: int) -> None:
    """All of a window but `finish`."""
    world_size = moo.exchange.world_size
    for micro_step in range(micro_steps):
        told = [Slot(rank % LANGUAGES, 5, 5.0 * micro_steps) for rank in range(world_size)]
        moo.exchange._gather = lambda mine, told=told: [  # type: ignore[method-assign]
            torch.cat([mine[: -len(slot.to_numbers())], torch.tensor(slot.to_numbers())])
            if len(mine) > len(slot.to_numbers()) else mine for slot in told
        ]  # fmt: skip
        moo.begin_micro_step(told[0], micro_step + 1 == micro_steps)
        for bucket in range(len(moo.plan.buckets)):
            flat = torch.randn(world_size * moo.exchange.shard_numel(NUMEL))
            moo.ingest(bucket, OnDevice(flat))
        moo.end_micro_step([True] * len(moo.plan.parameters))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.waits = 0
    for module in (transfer, store):
        monkeypatch.setattr(module, "pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("aggregator", "mode", "granularity"),
    [
        *itertools.product(AGGREGATORS, ("streaming",), ("bucket",)),
        *itertools.product(AGGREGATORS, ("deferred",), ("model",)),
    ],
)
def test_the_host_waits_once_a_window(
    aggregator: str, mode: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "TOGETHER", 3 * NUMEL)
    micro_steps = 1 if mode == "streaming" else 2
    scaling = {"normalize": "unit", "rescale": "mean", "weight_smoothing": 0.5} if mode == "streaming" else {}
    with FakeDevice() as device:
        moo = make(Echo(8), micro_steps, aggregator=aggregator, mode=mode, granularity=granularity, **scaling)
        run_window(moo, micro_steps)
        assert (device.reads, device.pageable, Event.waits) == ({}, 0, 0)
        moo.finish()
        assert (device.reads, device.pageable, Event.waits) == ({}, 0, 1)
    assert moo.last is not None
    assert not moo.last.nonfinite
    assert moo.last.weights.sum() > 0


@pytest.mark.parametrize("row_storage", ["host", "bfloat16"])
def test_rows_are_kept_without_a_wait(row_storage: str) -> None:
    with FakeDevice() as device:
        moo = make(Echo(2), 3, aggregator="mgda", row_storage=row_storage)
        run_window(moo, 3)
        assert (device.reads, device.pageable, Event.waits) == ({}, 0, 0)
        moo.finish()
        assert (device.reads, device.pageable, Event.waits) == ({}, 0, 1)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_windows_that_solve_nothing_wait_once(micro_steps: int) -> None:
    with FakeDevice() as device:
        moo = make(Echo(2), micro_steps, aggregator="mgda", gram_every=2)
        for window in range(3):
            run_window(moo, micro_steps)
            assert (device.reads, device.pageable, Event.waits) == ({}, 0, window)
            assert moo.finish().fresh == (window != 1)
        assert (device.reads, device.pageable, Event.waits) == ({}, 0, 3)


def test_a_read_is_seen() -> None:
    """The test above can fail."""
    with FakeDevice() as device:
        here = OnDevice(torch.ones(2, 2))
        here.cpu()
        torch.empty(2, 2).copy_(here)
        here[here > 0]
        here.sum().item()
        bool(here.any())
        assert sum(device.reads.values()) == 5
        torch.ones(3).to(DEVICE)
        assert device.pageable == 1


def test_tokens_are_counted_without_a_wait() -> None:
    """Labels that lie on the device, and counts that do: nothing is waited for before a backward asks."""
    config = BucketMOOConfig(languages=["de", "fr"])
    with FakeDevice() as device:
        tracker = LanguageTracker(config)
        labels = OnDevice(torch.tensor([[1, -100, 3], [4, 5, -100]]))
        tracker.note(Entries(language="de", labels=labels), training=True)
        tracker.note(
            Entries(language="de", target_tokens=OnDevice(torch.tensor([4, 3])), num_items=OnDevice(torch.tensor(20))),
            training=True,
        )
        assert (device.reads, Event.waits) == ({}, 0)
        slot = tracker.slot(1, 2)
    assert isinstance(slot, Slot)
    assert (slot.target_tokens, slot.scale) == (2 + 7, 20 / 2)


_CAUSAL = torch.ones(1, 4, 4, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "told",
    [
        {"position_ids": torch.tensor([[0, 1, 0, 1]])},
        {"seq_idx": torch.tensor([[0, 0, 1, 1]])},
        {"cu_seqlens": torch.tensor([0, 2, 4])},
        {"cu_seqlens": [0, 2, 4]},
        {"attention_mask": torch.tensor([[1, 1, 2, 2]])},
        {"attention_mask": _CAUSAL & (torch.arange(4) // 2 == (torch.arange(4) // 2).unsqueeze(1))},
        {"target_tokens": torch.tensor([3, 4])},
        {},
    ],
)
@pytest.mark.parametrize("languages", [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 7], [0, 0, -1, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("on_device", [True, False])
def test_rows_are_known_without_a_wait(told: dict[str, Any], languages: list[int], on_device: bool) -> None:
    """Nor do they say anything else than where all lies on the host."""
    table, value = LanguageTable(["de", "fr"]), torch.tensor([languages])
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.tensor([[4, 5, -100, 6]])} | told
    try:
        expected = rows_of(value, (), inputs, table, shifted=True)
    except LanguageError as error:
        text: str | None = str(error)
    else:
        text = None
    with FakeDevice() as device:
        there = {key: OnDevice(each) if isinstance(each, Tensor) else each for key, each in inputs.items()}
        if 7 in languages and not on_device:
            with pytest.raises(LanguageError, match="language 7"):  # at once
                rows_of([languages], (), there, table, shifted=True)
            return
        found = rows_of(OnDevice(value) if on_device else [languages], (), there, table, shifted=True)
        assert (device.reads, device.pageable, Event.waits) == ({}, 0, 0)
        assert found.checks
        if text is None:
            found.check()
            assert Event.waits == len(found.checks)
        else:
            with pytest.raises(LanguageError) as raised:
                found.check()
            assert str(raised.value) == text
    if text is None:
        for name in ("languages", "documents", "target_tokens"):
            assert torch.equal(getattr(found, name).numbers, getattr(expected, name)), name


# What a window of 70 buckets queues on the device and between ranks, as a model of 8 billion parameters has: its
# exchange, a few kernels, and a share of a collective of Grams.
@pytest.mark.parametrize("world_size", [8, 64, 1024])
@pytest.mark.parametrize(("mode", "collectives", "kernels"), [("streaming", 70 + 14, 9), ("deferred", 70 + 2, 4)])
def test_counted_launches_and_collectives(
    world_size: int, mode: str, collectives: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "TOGETHER", 5 * NUMEL)
    exchange = Echo(world_size)
    with FakeDevice() as device:
        moo = make(exchange, buckets=70, aggregator="mgda", mode=mode)
        run_window(moo, 1)
        moo.finish()
    assert sum(exchange.collectives.values()) <= collectives
    assert device.kernels.total() <= kernels * 70
