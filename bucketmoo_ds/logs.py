"""The package's logger. It shows its lines where nobody has set up logging, as users of a bare script expect."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("bucketmoo_ds")


def show_by_default() -> None:
    """Writes messages of level INFO and above to standard error, unless the program has handlers of its own.

    A level that was set before is kept.
    """
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s"))
        logger.addHandler(handler)
