"""Micro-batches that mix languages, resolved in one backward under any wrapper."""

from bucketmoo_ds.adapters.mixed.coverage import row_wise
from bucketmoo_ds.adapters.mixed.register import register
from bucketmoo_ds.adapters.mixed.session import MixedSession

__all__ = ["MixedSession", "register", "row_wise"]
