"""Our file in a checkpoint: whole or not at all, and refused with a reason where it is not ours."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulated_ranks import SimulatedExchange, run_ranks

from bucketmoo_ds.adapters.deepspeed.engine import CarefulCheckpointEngine
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError
from bucketmoo_ds.pipeline import checkpoint
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks

CONFIG = BucketMOOConfig(languages=("de", "fr"), seed=4)
PLAN = plan_blocks([Parameter("w", 5), Parameter("v", 7)], 6, "bucket")
STATES = {"moo": {"windows": 3, "counters": {"windows": 3}}, "sampler": {"epoch": 1, "order": [2, 0, 1]}}


def save(folder: Path, states: Any = STATES, world_size: int = 1) -> list[Any]:
    """Saves on every rank; returns what each one raised."""
    return run_ranks(world_size, lambda exchange: checkpoint.save(folder, CONFIG, PLAN, states, exchange))


def rewrite(folder: Path, change: Any) -> str:
    """Saves, edits the file's content, and returns the message with which it is refused."""
    assert save(folder) == [None]
    path = folder / checkpoint.FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(folder, CONFIG)
    assert str(caught.value).startswith(f"{folder / checkpoint.FILE}: ")
    return str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=30)
@given(states=st.dictionaries(st.text(), st.dictionaries(st.text(), json_values, max_size=3), max_size=3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, states: dict[str, dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("checkpoint") / "made" / "on the way"
    assert save(folder, states) == [None]
    assert checkpoint.load(folder, CONFIG) == states
    assert os.listdir(folder) == [checkpoint.FILE]


def test_file_is_json_that_names_what_it_belongs_to(tmp_path: Path) -> None:
    save(tmp_path)
    content = json.loads((tmp_path / checkpoint.FILE).read_text())
    assert content["format"] == checkpoint.FORMAT
    assert BucketMOOConfig.from_section(content["bucket_moo"]) == CONFIG
    assert content["plan"] == PLAN.to_json()


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[Path] = []
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, text: writes.append(path))
    assert save(tmp_path, world_size=3) == [None] * 3
    assert writes == [tmp_path / checkpoint.FILE]


class FullDisk(io.TextIOWrapper):
    """A file on a disk that is full after a few bytes."""

    def write(self, text: str) -> int:
        super().write(text[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(self: Path, mode: str, encoding: str) -> FullDisk:
        return FullDisk(io.FileIO(self, mode), encoding=encoding)

    monkeypatch.setattr(Path, "open", open_full)


@pytest.mark.parametrize("world_size", [1, 3])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """The error names the path on every rank, the old file is whole, and nothing temporary is left."""
    save(tmp_path)
    before = (tmp_path / checkpoint.FILE).read_bytes()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        found = save(tmp_path, {"moo": {"windows": 9}}, world_size)
    for error in found:
        assert isinstance(error, BucketMOOError)
        path = tmp_path / checkpoint.FILE
        assert str(error) == f"the checkpoint was not saved: rank 0: {path}: No space left on device"
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    assert os.listdir(tmp_path) == [checkpoint.FILE]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_at_any_step_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path)
    before = (tmp_path / checkpoint.FILE).read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
        (error,) = save(tmp_path, {"moo": {"windows": 9}})
    assert isinstance(error, BucketMOOError)
    assert "Input/output error" in str(error)
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    assert os.listdir(tmp_path) == [checkpoint.FILE]


@pytest.mark.parametrize(
    ("raised", "beside", "expected"),
    [
        (RuntimeError("unexpected pos 7 vs 5"), errno.ENOSPC, "No space left on device (unexpected pos 7 vs 5)"),
        (RuntimeError("unexpected pos 7 vs 5"), errno.EDQUOT, "Disk quota exceeded (unexpected pos 7 vs 5)"),
        (RuntimeError("cannot pickle"), None, "cannot pickle"),
        (OSError(errno.EIO, "Input/output error"), errno.ENOSPC, "[Errno 5] Input/output error"),
    ],
    ids=["full", "quota", "another reason", "a reason that is known"],
)
def test_what_torch_could_not_write_has_the_systems_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, beside: int | None, expected: str
) -> None:
    class Fails:
        def save(self, state_dict: object, path: str) -> None:
            raise raised

    def sync(file: int) -> None:
        if beside is not None:
            raise OSError(beside, os.strerror(beside))

    monkeypatch.setattr(os, "fsync", sync)
    engine = CarefulCheckpointEngine(Fails())
    engine.save({}, str(tmp_path / "part.pt"))
    assert engine.problem == f"{tmp_path / 'part.pt'}: {expected}"
    engine.save({}, str(tmp_path / "another.pt"))
    assert "part.pt" in engine.problem, "the first problem is told"
    assert os.listdir(tmp_path) == []


def test_torch_on_a_device_that_is_full() -> None:
    """What torch raises for a full disk names no reason by itself."""
    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save({"a": torch.zeros(10_000)}, "/dev/full")


def test_first_save_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert isinstance(save(tmp_path)[0], BucketMOOError)
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for error in save(tmp_path / "file" / "global_step3", world_size=2):
        assert isinstance(error, BucketMOOError)
        assert str(tmp_path / "file" / "global_step3" / checkpoint.FILE) in str(error)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_rank_could_not_write_all_are_told(rank: int) -> None:
    def body(exchange: Any) -> None:
        checkpoint.check_saved("/there: No space left on device" if exchange.rank == rank else "", exchange)

    for error in run_ranks(3, body):
        assert isinstance(error, BucketMOOError)
        assert str(error) == f"the checkpoint was not saved: rank {rank}: /there: No space left on device"


def test_latest_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(tag: str) -> list[Any]:
        return run_ranks(2, lambda exchange: checkpoint.name_latest(tmp_path, tag, exchange))

    assert name("one") == [None, None]
    with monkeypatch.context() as patch:
        fill_disk(patch)
        for error in name("two"):
            assert isinstance(error, BucketMOOError)
            assert "rank 0: " in str(error)
    assert (tmp_path / checkpoint.LATEST).read_text() == "one"
    assert name("three") == [None, None]
    assert (tmp_path / checkpoint.LATEST).read_text() == "three"
    assert os.listdir(tmp_path) == [checkpoint.LATEST]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", object()])
def test_state_that_is_no_json_is_an_error_on_every_rank(tmp_path: Path, value: object) -> None:
    """Rank 0 alone notices: raising there alone would leave the others waiting."""
    save(tmp_path)
    before = (tmp_path / checkpoint.FILE).read_bytes()
    for error in save(tmp_path, {"sampler": {"state": value}}, world_size=2):
        assert isinstance(error, BucketMOOError)
        assert str(error).startswith(f"the checkpoint was not saved: rank 0: {tmp_path / checkpoint.FILE}: ")
        assert "plain JSON" in str(error)
    assert (tmp_path / checkpoint.FILE).read_bytes() == before


def test_missing_file_is_none_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bucketmoo_ds"):
        assert checkpoint.load(tmp_path, CONFIG) is None
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()
    assert "windows count from 0" in record.getMessage()


def test_present_file_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path)
    with caplog.at_level(logging.WARNING, logger="bucketmoo_ds"):
        checkpoint.load(tmp_path, CONFIG)
    assert not caplog.records


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"{}",
        b'{"format": 1}',
        b"\xff\xfe\x00",
        b'{"model_state": {}}',
        b'{"format": 1, "bucket_moo": [], "states": {}}',
        b'{"format": 1, "bucket_moo": {"languages": ["de", "fr"]}}',
        b'{"format": 1, "bucket_moo": {"languages": ["de", "fr"]}, "states": 3}',
    ],
)
def test_damaged_or_foreign(tmp_path: Path, data: bytes) -> None:
    (tmp_path / checkpoint.FILE).write_bytes(data)
    assert "damaged, or not written by bucketmoo_ds" in refusal(tmp_path)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_cut_short_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    save(folder)
    whole = (folder / checkpoint.FILE).read_bytes()
    (folder / checkpoint.FILE).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert "damaged" in refusal(folder)


def test_other_format(tmp_path: Path) -> None:
    message = rewrite(tmp_path, lambda content: content.update(format=2))
    assert "format 2, expected 1; load it with the version that wrote it" in message


def test_other_format_with_other_fields(tmp_path: Path) -> None:
    """A later version may call everything otherwise: that does not make its file a damaged one."""
    (tmp_path / checkpoint.FILE).write_text('{"format": 7, "moo": {}}')
    assert "format 7, expected 1" in refusal(tmp_path)


@pytest.mark.parametrize("languages", [["de"], ["fr", "de"], ["de", "fr", "uk"], ["de", "pt"]])
def test_other_languages(tmp_path: Path, languages: list[str]) -> None:
    message = rewrite(tmp_path, lambda content: content["bucket_moo"].update(languages=languages))
    assert f"saved with bucket_moo.languages = {languages}, here ['de', 'fr']" in message
    assert "same languages in the same order" in message


def test_other_settings_may_change(tmp_path: Path) -> None:
    """Another aggregator from here on is a choice, not a mistake."""
    save(tmp_path)
    assert checkpoint.load(tmp_path, BucketMOOConfig(languages=("de", "fr"), aggregator="cagrad")) == STATES


def test_simulated_rank_without_hub_is_only_for_routes() -> None:
    with pytest.raises(AssertionError):
        SimulatedExchange(0, 2).gather_numbers([1])
