"""What cannot be the same with transformers 4."""

from __future__ import annotations

from importlib import metadata

import pytest

_IS_4 = metadata.version("transformers").startswith("4.")

counted_otherwise_by_4 = pytest.mark.skipif(
    _IS_4, reason="plain Trainer of transformers 4 counts the first token of a sequence, which is not predicted"
)
refused_by_4 = pytest.mark.skipif(_IS_4, reason="transformers 4 divides smoothed losses otherwise: refused")
saves_no_last_by_4 = pytest.mark.skipif(_IS_4, reason="transformers 4 has no enable_jit_checkpoint")
