"""The metrics file: what is written is read back, a killed run hurts nothing, a resumed one has no step twice."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.apps.monitor.reader import read
from bucketmoo_ds.apps.monitor.records import MetricsError
from bucketmoo_ds.apps.monitor.writer import JsonLinesWriter

RUN = {
    "event": "run",
    "time": "2026-11-21T00:00:00Z",
    "aggregator": "mgda",
    "granularity": "layer",
    "languages": ["de", "fr"],
    "world_size": 2,
    "micro_steps": 1,
    "mode": "deferred",
    "blocks": ["head"],
    "config": {},
    "versions": {},
}


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": None,
        "seconds": 0.25,
        "tokens": 10,
        "skipped": False,
        "nonfinite": [],
        "language_loss": {"de": 2.0, "fr": 3.0},
        "language_tokens": {"de": 4, "fr": 6},
    } | changes


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read(path) if record["event"] == "step"]


floats = st.floats(allow_nan=True, allow_infinity=True)
names = st.text(min_size=1, max_size=5)


@settings(deadline=None)
@given(loss=floats, by_language=st.dictionaries(names, floats, max_size=4), cosine=st.lists(st.lists(floats)))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, loss: float, by_language: Any, cosine: Any) -> None:
    path = tmp_path_factory.mktemp("run") / "new" / "metrics.jsonl"
    record = step(1, loss=loss, language_loss=by_language, cosine=[cosine])
    with JsonLinesWriter(path) as writer:
        writer.write(RUN)
        writer.write(record)

    def null(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: null(item) for key, item in value.items()}
        if isinstance(value, list):
            return [null(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert read(path) == [RUN, null(record)]


def test_each_line_is_there_as_soon_as_it_was_written(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "m.jsonl")
    for number in range(1, 4):
        writer.write(step(number))
        assert steps_of(writer.path) == list(range(1, number + 1))


@settings(deadline=None)
@given(every=st.integers(1, 7), count=st.integers(1, 30), bad=st.sets(st.integers(1, 30)))
def test_sums_survive_the_steps_that_get_no_line(
    tmp_path_factory: pytest.TempPathFactory, every: int, count: int, bad: set[int]
) -> None:
    path = tmp_path_factory.mktemp("run") / "m.jsonl"
    with JsonLinesWriter(path, every=every) as writer:
        for number in range(1, count + 1):
            writer.write(step(number, tokens=number, language_tokens={"de": number}, skipped=number in bad))
    lines = [record for record in read(path) if record["event"] == "step"]
    wanted = {n for n in range(1, count + 1) if (n - 1) % every == 0 or n in bad} | {count}
    assert [line["step"] for line in lines] == sorted(wanted)
    assert sum(line["tokens"] for line in lines) == count * (count + 1) // 2
    assert sum(line["language_tokens"]["de"] for line in lines) == count * (count + 1) // 2
    assert sum(line["seconds"] for line in lines) == count * 0.25


def test_detail_only_on_the_lines_that_want_it(tmp_path: Path) -> None:
    with JsonLinesWriter(tmp_path / "m.jsonl", detail_every=4) as writer:
        for number in range(1, 10):
            writer.write(step(number, conflict=[0.5], weights={"de": [1.0]}))
    detailed = [record["step"] for record in read(writer.path) if "conflict" in record or "weights" in record]
    assert detailed == [1, 5, 9]
    assert [number for number in range(1, 10) if writer.wants_detail(number)] == detailed


@pytest.mark.parametrize("cut", [1, 2, 17, 60])
def test_a_torn_last_line_is_dropped_and_a_resumed_run_goes_on_after_it(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLinesWriter(path) as writer:
        writer.write(RUN)
        for number in range(1, 6):
            writer.write(step(number))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # One byte less takes only the newline: the record is still whole.
    assert steps_of(path) == ([1, 2, 3, 4, 5] if cut == 1 else [1, 2, 3, 4])
    with JsonLinesWriter(path, resume_from_step=4) as writer:
        writer.write(step(5))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [b'{"event": "st\n', b"\n", b"[1]\n", b'{"event":"eval","step":1,"bits_per_byte":{"de":NaN}}\n', b"\xff\n"],
)
def test_nothing_but_a_torn_last_line_is_forgiven(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "m.jsonl"
    good = json.dumps(step(1)).encode() + b"\n"
    path.write_bytes(good + line + good)
    with pytest.raises(MetricsError, match=r"m\.jsonl, line 2"):
        read(path)
    path.write_bytes(good + line)
    with pytest.raises(MetricsError, match=r"m\.jsonl, line 2"):
        read(path)


@pytest.mark.parametrize("resumed", [0, 3, 9])
def test_a_resumed_run_has_no_step_twice(tmp_path: Path, resumed: int) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLinesWriter(path) as writer:
        writer.write(RUN)
        for number in range(1, 7):
            writer.write(step(number))
            writer.write({"event": "eval", "step": number, "bits_per_byte": {"de": 1.0}})
        writer.write({"event": "end", "step": 6, "seconds": 1.0})
    with JsonLinesWriter(path, resume_from_step=resumed) as writer:
        writer.write(RUN)
        for number in range(resumed + 1, resumed + 3):
            writer.write(step(number, loss=1.0))
    kept = min(resumed, 6)
    assert steps_of(path) == [*range(1, kept + 1), resumed + 1, resumed + 2]
    assert [record["step"] for record in read(path) if record["event"] == "eval"] == list(range(1, kept + 1))
    assert sum(record["event"] == "run" for record in read(path)) == 2
    assert not any(record["event"] == "end" for record in read(path))
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_a_crash_while_rewinding_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLinesWriter(path) as writer:
        for number in range(1, 5):
            writer.write(step(number))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "input/output error")))
            with pytest.raises(OSError, match=r"m\.jsonl"):
                writer.rewind(2)
        assert path.read_bytes() == before
        writer.rewind(2)
        writer.write(step(3))
    assert steps_of(path) == [1, 2, 3]


def test_a_new_run_does_not_write_into_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JsonLinesWriter(path).write(step(1))
    with pytest.raises(FileExistsError, match="resume_from_step"):
        JsonLinesWriter(path)
    assert steps_of(path) == [1]


def test_going_back_without_rewind_is_an_error(tmp_path: Path) -> None:
    with JsonLinesWriter(tmp_path / "m.jsonl") as writer:
        writer.write(step(5))
        with pytest.raises(MetricsError, match=r"rewind\(2\)"):
            writer.write(step(3))


def test_a_full_disk_is_named() -> None:
    writer = JsonLinesWriter("/dev/full")
    with pytest.raises(OSError, match="/dev/full") as failure:
        writer.write(step(1))
    assert failure.value.errno == errno.ENOSPC


def test_a_disk_that_fills_up_within_a_line_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JsonLinesWriter(tmp_path / "m.jsonl")
    writer.write(step(1))
    write, room = os.write, [20]

    def filling(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        size, room[0] = room[0], 0
        return write(file, data[:size])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling)
        with pytest.raises(OSError, match=r"m\.jsonl"):
            writer.write(step(2))
    writer.write(step(3))
    assert steps_of(writer.path) == [1, 3]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"event": "stepp"}, "unknown"),
        ({key: value for key, value in step(1).items() if key != "loss"}, "needs the key loss"),
        (step(1, los=3), 'did you mean "loss"'),
        (step(1.5), "whole number"),  # type: ignore[arg-type]
        (step(1, loss=object()), "no JSON"),
    ],
)
def test_a_record_that_is_not_of_the_schema_is_refused(tmp_path: Path, record: Any, message: str) -> None:
    with JsonLinesWriter(tmp_path / "m.jsonl") as writer, pytest.raises(MetricsError, match=message):
        writer.write(record)
    assert read(writer.path) == []


@pytest.mark.parametrize("setting", [{"every": 0}, {"detail_every": -1}, {"resume_from_step": -1}])
def test_bad_settings_are_named(tmp_path: Path, setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        JsonLinesWriter(tmp_path / "m.jsonl", **setting)
