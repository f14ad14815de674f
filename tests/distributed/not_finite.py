"""What holds of a window under a wrapper in which the rows of one language were not finite."""

from __future__ import annotations

import math
from typing import Any

Case = dict[str, Any]


def check_not_finite(found: list[Any], case: Case) -> None:
    for result in found:
        assert "error" not in result, result
        assert result["skipped"]
        assert {language for language, _ in result["nonfinite"]} == {"fr"}
        assert result["dropped"] == result.get("unchanged", False) == (case["on_nonfinite"] == "drop")
        assert result["nan"] == math.isnan(result["norm"]) == (case["on_nonfinite"] == "keep")
        assert result["norm"] == 0.0 or result["nan"], "clipping takes what is left"
        counters = {name: count for name, count in result["counters"].items() if name != "flat_micro_steps"}
        assert counters == {"windows": 4, "skipped_windows": 1, "nonfinite.fr": 1}
        assert result["goes_on"]
        assert result["finite"]
        assert not result["skipped_later"]
    assert len({result["weights"] for result in found}) == 1
