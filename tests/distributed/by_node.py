"""Worker: 4 ranks as two nodes or two replicas; compares gradients with the reference, or plays a scenario."""

from __future__ import annotations

from typing import Any

import fsdp2_scenarios
import worker
import wrapped


def run(*, scenario: str | None = None, **fields: Any) -> Any:
    return fsdp2_scenarios.run(scenario, **fields) if scenario else wrapped.run(**fields)


if __name__ == "__main__":
    worker.serve(run)
