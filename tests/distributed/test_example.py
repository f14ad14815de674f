"""`examples/train_wrapped.py` runs under every wrapper by one option, and goes on where it was saved; so does
`examples/train_accelerate.py`."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest
from draw import some

WRAPPERS = {"fsdp2": 2, "fsdp1": 2, "ddp": 2, "deepspeed": 2, "single": 1}
LANGUAGES = ["--languages", "de", "fr", "ko"]
RULE = ["--aggregator", "upgrad"]
EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE, ACCELERATE = str(EXAMPLES / "train_wrapped.py"), str(EXAMPLES / "train_accelerate.py")


class _Whole(dict[str, dict[int, str]]):
    """What an uninterrupted run of four steps prints, by wrapper; each is run when it is asked for first."""

    def __missing__(self, wrapper: str) -> dict[int, str]:
        self[wrapper] = steps(wrapper, *LANGUAGES, *RULE, "--steps", "4")
        return self[wrapper]


@pytest.fixture(scope="module")
def whole() -> _Whole:
    return _Whole()


@pytest.mark.parametrize("wrapper", some([(wrapper,) for wrapper in WRAPPERS], 2))
def test_saved_run_goes_on_as_if_it_had_not_stopped(wrapper: str, whole: _Whole, tmp_path: Path) -> None:
    """The loss that rank 0 prints, and the weights, to all printed digits."""
    assert list(whole[wrapper]) == [0, 1, 2, 3]
    kept = [*LANGUAGES, *RULE, "--save", str(tmp_path / "saved")]
    first, second = steps(wrapper, *kept, "--steps", "2"), steps(wrapper, *kept, "--steps", "4")
    assert first | second == whole[wrapper]
    assert list(second) == [2, 3]


# bf16 of the others: test_wrapper_parity.py
@pytest.mark.parametrize("wrapper", some([("fsdp2",), ("deepspeed",), ("single",)], 1))
def test_bf16_is_close_to_fp32(wrapper: str, whole: _Whole) -> None:
    """The first losses, of which bfloat16's rounding is a few 2^-8; at 5.5, the last printed digits of one differ."""
    bf16 = steps(wrapper, *LANGUAGES, *RULE, "--steps", "2", "--dtype", "bf16")
    assert [whole[wrapper][step] for step in bf16] != list(bf16.values())
    for step, said in bf16.items():
        exact, rounded = (float(re.match(r"loss ([\d.]+)", text)[1]) for text in (whole[wrapper][step], said))
        assert abs(rounded - exact) < 2.0**-6 * exact


def test_accelerate_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within its second epoch, of six windows."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    saved = ["--save", str(tmp_path / "saved")]
    words = (["--windows", "9"], [*saved, "--windows", "7"], [*saved, "--windows", "9"])
    runs = [said(ACCELERATE, 2, *each) for each in words]
    assert list(runs[0]) == list(range(1, 10))
    assert list(runs[2]) == [8, 9]
    assert runs[1] | runs[2] == runs[0]


def test_text_of_files_is_read(tmp_path: Path) -> None:
    for name in ("de", "fr"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 400)
    assert steps("single", "--steps", "1", "--text", str(tmp_path)) != steps("single", "--steps", "1")


def steps(wrapper: str, *arguments: str) -> dict[int, str]:
    """Runs the example; returns what it printed of each step."""
    return said(EXAMPLE, WRAPPERS[wrapper], "--wrapper", wrapper, *arguments)


def said(file: str, ranks: int, *words: str) -> dict[int, str]:
    outcomes = launch.launch("run_file.py", ranks, {"file": file, "words": list(words), "leave": "'done'"})
    for outcome in outcomes:
        assert outcome.result == "done", outcome.output[-3000:]
    return {int(step): rest for step, rest in re.findall(r"^step (\d+): (.*)$", outcomes[0].output, re.MULTILINE)}
