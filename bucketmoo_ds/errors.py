"""The errors of this package, and the "did you mean" that goes with a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BucketMOOError(RuntimeError):
    """A run that was asked to resolve conflicts and cannot; it must stop, never fall back to averaging."""


class ConfigError(BucketMOOError, ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with another one."""


class LanguageError(BucketMOOError):
    """A micro-batch whose language is missing, unknown, mixed, or not allowed in this slot."""


class DisagreementError(BucketMOOError):
    """Ranks that should hold the same plan, position or gradients do not."""


class MissingPackageError(BucketMOOError, ImportError):
    """A package that is not installed, and that only what was asked for needs."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean "x"?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def one_of(known: Iterable[str]) -> str:
    """Returns the known names as a readable list: `one of "a", "b"`."""
    return "one of " + ", ".join(f'"{name}"' for name in known)
