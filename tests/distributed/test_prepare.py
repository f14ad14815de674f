"""`bm.prepare` under what Accelerate wraps a model in: the step of a window is the one by hand in float64, and a run
that `save_state` saved goes on with the same bits. Mixed, the mean by token is plain Accelerate's, also where the last
window of an epoch is short."""

from __future__ import annotations

import pytest
from draw import SEED, Case, Key, some
from outcomes import Outcomes

# Rows and weights are float32: a step is a difference of weights, whose rounding of 6e-8 is a few 1e-6 of the step.
TOLERANCE = 2e-5

WRAPPERS = {
    "ddp of one": (1, "DistributedDataParallel"),
    "ddp": (2, "DistributedDataParallel"),
    "fsdp2": (2, "FSDPToyLM"),
    "zero2": (2, "BucketMOOEngine"),
    "zero3": (2, "BucketMOOEngine"),
}
MICRO_STEPS = (1, 2)
NOT_REGISTERED = "outside of a forward pass of the registered model"
CASES: dict[Key, Case] = {
    (ranks, f"{wrapper}-{mode}-M{micro_steps}"): {
        "wrapper": wrapper.split()[0],
        "micro_steps": micro_steps,
        "mode": mode,
        "seed": SEED + micro_steps,
    }
    for wrapper, (ranks, _) in WRAPPERS.items()  # mixed, a micro-step holds each language: two batches do
    for mode, several in (("auto", MICRO_STEPS), ("mixed", MICRO_STEPS[:ranks]))
    for micro_steps in several
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return Outcomes(request, "prepare_loops.py", CASES)


@pytest.mark.parametrize("key", some([(key,) for key in CASES], 5))
def test_a_window_is_the_one_by_hand(key: Key, outcomes: Outcomes) -> None:
    case = CASES[key]
    for result in outcomes[key]:
        assert "error" not in result, result
        assert result["off"] < TOLERANCE, outcomes.explain(key)
        assert case["mode"] == "mixed" or WRAPPERS[case["wrapper"]][1] in result["wrapper"]
        assert result.get("windows", 6) == 6  # the last of half as many micro-steps
        assert NOT_REGISTERED in result.get("inside", NOT_REGISTERED), result
        assert result.get("same", True), f"resumed otherwise: {outcomes.explain(key)}"
