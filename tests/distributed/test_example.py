"""`examples/train_wrapped.py` runs under every wrapper by one option, and goes on where it was saved."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest

WRAPPERS = {"fsdp2": 2, "fsdp1": 2, "ddp": 2, "deepspeed": 2, "single": 1}
LANGUAGES = ["--languages", "de", "fr", "ko"]

every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


@every_wrapper
def test_saved_run_goes_on_as_if_it_had_not_stopped(wrapper: str, tmp_path: Path) -> None:
    """The loss that rank 0 prints, and the weights, to all printed digits."""
    arguments = [*LANGUAGES, "--aggregator", "upgrad"]
    whole = steps(wrapper, *arguments, "--steps", "4")
    assert list(whole) == [0, 1, 2, 3]
    kept = [*arguments, "--save", str(tmp_path / "saved")]
    first, second = steps(wrapper, *kept, "--steps", "2"), steps(wrapper, *kept, "--steps", "4")
    assert first | second == whole
    assert list(second) == [2, 3]


@every_wrapper
def test_bf16_is_close_to_fp32(wrapper: str) -> None:
    """The first loss, of which bfloat16's rounding is a few 2^-8; at 5.5, its last printed digits differ."""
    fp32, bf16 = (steps(wrapper, *LANGUAGES, "--steps", "1", "--dtype", dtype)[0] for dtype in ("fp32", "bf16"))
    assert fp32 != bf16
    exact, rounded = (float(re.match(r"loss ([\d.]+)", text)[1]) for text in (fp32, bf16))
    assert abs(rounded - exact) < 2.0**-6 * exact


def test_text_of_files_is_read(tmp_path: Path) -> None:
    for name in ("de", "fr"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 400)
    assert steps("single", "--steps", "1", "--text", str(tmp_path)) != steps("single", "--steps", "1")


def steps(wrapper: str, *arguments: str) -> dict[int, str]:
    """Runs the example; returns what it printed of each step."""
    outcomes = launch.launch("run_example.py", WRAPPERS[wrapper], ["--wrapper", wrapper, *arguments])
    for outcome in outcomes:
        assert outcome.result == "done", outcome.output[-3000:]
    return {int(step): rest for step, rest in re.findall(r"^step (\d+): (.*)$", outcomes[0].output, re.MULTILINE)}
