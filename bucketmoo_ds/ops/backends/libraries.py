"""Loads a compiled backend's library, or says in one line why that does not work: never an error, never a wait without
end, so that the choice among the backends goes on to the next."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bucketmoo_ds.ops import build


def load(find_or_build: Callable[..., str]) -> str:
    """Loads the library that the function names; returns "", or the reason why it cannot be had here. One that came
    with a wheel may have been made for newer system libraries: another is built then, where there is a compiler."""
    reason = ""
    for installed in (True, False):
        try:
            library = find_or_build(installed=installed)
        except build.BuildError as error:
            return "; ".join(filter(None, (reason, str(error))))
        try:
            torch.ops.load_library(library)
        except (OSError, RuntimeError) as error:
            reason = f"{library} cannot be loaded ({str(error).strip().splitlines()[0]})"
        else:
            return ""
    return f"{reason}: delete it, and it is built anew"
