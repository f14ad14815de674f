"""How far a distributed run under DeepSpeed may be from the float64 reference."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]

# A relative rounding, at most: half a unit in the last of 8 and of 11 bits.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def tolerance(case: Case) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows.

    Rows are kept, and the combined gradient is written, in float32 (relative rounding 6e-8); a row of M micro-steps
    adds M - 1 roundings and M scalings: below 5e-7 up to M = 3. So it is in 16 bits too where rows are summed in
    float32, for the gradients that autograd gave are the input of both sides. What is rounded to bf16 (2^-8 at most) or
    fp16 (2^-11) is: the result where DeepSpeed accumulates in 16 bits; and on ZeRO-0 and 1, where a rank adds up its
    micro-steps before they are exchanged, the sum on the wire, or with 16-bit accumulation each of the M - 1 partial
    sums. fp16 has no number nearer to 0 than 6e-8, which is nothing next to 2^-11 of a gradient that is scaled by 256.

    Rows that are stored in bf16 are rounded once for each micro-batch, and once more for the scale of the first.
    """
    dtype, in_float32 = case.get("dtype", "fp32"), case.get("accumulate") == "fp32"
    if case.get("moo", {}).get("row_storage") == "bfloat16":
        return (case["micro_steps"] + 1) * ROUNDING["bf16"]
    if dtype == "fp32":
        return 5e-7
    roundings = 0 if in_float32 else 1
    if case["stage"] < 2 and case["micro_steps"] > 1:
        roundings += 1 if in_float32 else case["micro_steps"] - 1
    return roundings * ROUNDING[dtype] or 5e-7
