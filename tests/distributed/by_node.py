"""Worker: 4 ranks as two nodes or two replicas; compares gradients with the reference, or plays a scenario."""

from __future__ import annotations

from typing import Any

import worker
import wrapped
import wrappers_contract


def run(*, scenario: str | None = None, **fields: Any) -> Any:
    return wrappers_contract.run(scenario, **fields) if scenario else wrapped.run(**fields)


if __name__ == "__main__":
    worker.serve(run)
