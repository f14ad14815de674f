"""Runs on mixed languages: what they send, that they resume, and that nothing goes wrong on one rank alone.

Bytes are counted as in test_bytes.py: what every collective carried, by the standard algorithm's cost a rank.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from draw import SEED, Case, Key
from outcomes import Outcomes

K = 3
ZERO = {"wrapper": "zero", "dtype": "float32"}
SEEDED = {"seed": random.Random(f"{SEED}/runs").randrange(10**6)}

COUNTED: dict[str, Case] = {
    "ddp": {"wrapper": "ddp"},
    "fsdp2": {"wrapper": "fsdp2", "packed": True},
    "zero2": ZERO | {"stage": 2, "micro_steps": 2},
    "zero3": ZERO | {"stage": 3},
}
RESUMED: dict[str, Case] = {
    "zero2": ZERO | {"stage": 2, "micro_steps": 2},
    "zero3": ZERO | {"stage": 3, "packed": True},
}
FAULTS: dict[str, tuple[str, str]] = {
    "language": ("LanguageError", 'rank 1: the micro-batch names no language: add the entry "language"'),
    "unknown": ("LanguageError", "xx"),
    "settings": ("DisagreementError", "settings"),
    "expect": ("DisagreementError", "session.expect"),
}
FAULTY: dict[str, Case] = {"ddp": {"wrapper": "ddp"}, "zero2": ZERO | {"stage": 2}}
REFUSED: dict[str, str] = {
    "ddp": "bucketmoo_ds.mixed.register",
    "fsdp1": "bucketmoo_ds.mixed.register",
    "fsdp2": "bucketmoo_ds.mixed.register",
    "tensor parallel": 'module "0": "weight" is a DTensor',
    "sum": "gradient_allreduce_op",
    "late fsdp1": "register the model first, and wrap it then",
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cases: dict[Key, Case] = {}
    for name, case in COUNTED.items():
        cases[2, f"count {name}"] = {"what": "count", **case, **SEEDED}
    for name, case in RESUMED.items():
        folder = str(tmp_path_factory.mktemp(name))
        cases[2, f"resume {name}"] = {"what": "resume", "folder": folder, **case, **SEEDED}
    cases[2, "resume ddp"] = {"what": "resume_session", "wrapper": "ddp", **SEEDED}
    cases[2, "overflow"] = {"what": "overflow", "wrapper": "ddp", "dtype": "float32", **SEEDED}
    for how in REFUSED:
        cases[2, f"refused {how}"] = {"what": "refused", "how": how}
    for how in FAULTS:
        for name, case in FAULTY.items():
            cases[2, f"fault {how} {name}"] = {"what": "fault", "how": how, **case, **SEEDED}
    return Outcomes(request, "mixed_scenarios.py", cases, also=cases)


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_plains_and_a_gram_now_and_then(name: str, outcomes: Outcomes) -> None:
    micro_steps = COUNTED[name].get("micro_steps", 1)
    for result in outcomes[2, f"count {name}"]:
        assert "error" not in result, f"{result}, {SEED}"
        for part, windows in (("without", 3), ("with", 2)):
            plain, mixed = result[f"plain {part}"], result[f"mixed {part}"]
            assert mixed["gradients"] == plain["gradients"] > 0
            assert mixed.get("parameters") == plain.get("parameters")
            # Of every block, and of what was counted, the estimate's two matrices; 1 other rank.
            grams = 2 * (result["blocks"] + 1) * K * K * 8 if part == "with" else 0
            assert mixed.get("grams", 0) == grams
            # A micro-step: 6 numbers of 64 bits, and twice a number for each language.
            own = windows * micro_steps * (6 + 2 * K) * 8
            assert mixed["control"] - plain.get("control", 0) == own
            assert set(mixed) <= {"gradients", "parameters", "grams", "control"}
        carried: dict[str, int] = {}
        for part in ("without", "with"):
            for each, sent in result[f"carried {part}"].items():
                carried[each] = carried.get(each, 0) + sent
        assert {each: sent for each, sent in result["own"].items() if sent} == carried


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_equal(name: str, outcomes: Outcomes) -> None:
    for result in outcomes[2, f"resume {name}"]:
        assert "error" not in result, f"{result}, {SEED}"
        assert result["straight"] == result["resumed"]
        assert result["straight"]["windows"] == 4


def test_a_resumed_session_is_bit_equal(outcomes: Outcomes) -> None:
    for found in outcomes[2, "resume ddp"]:
        assert isinstance(found, list), found
        straight, resumed = found
        assert straight == resumed


def test_a_window_that_grad_scaler_skips_is_given_up(outcomes: Outcomes) -> None:
    for result in outcomes[2, "overflow"]:
        assert isinstance(result.get("error"), float), result
        assert result["windows"] == 1
        assert result["tokens"]
        # Multiplied by 2^10 and divided again: exact, but for what falls below float32's smallest numbers.
        assert result["error"] <= 1e-6
        assert result["gram"] <= 1e-6


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("how", FAULTS)
def test_every_rank_raises(how: str, name: str, outcomes: Outcomes) -> None:
    kind, text = FAULTS[how]
    results: list[Any] = outcomes[2, f"fault {how} {name}"]
    for result in results:
        assert result is not None and result["error"] == kind, results
        assert text in result["message"], results


@pytest.mark.parametrize("how", REFUSED)
def test_refused(how: str, outcomes: Outcomes) -> None:
    for result in outcomes[2, f"refused {how}"]:
        assert result is not None and result["error"] == "ConfigError", result
        assert REFUSED[how] in result["message"], result
