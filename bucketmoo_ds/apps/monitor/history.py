"""What a metrics file says about one training run, as arrays for plots and tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bucketmoo_ds.apps.monitor.reader import read
from bucketmoo_ds.apps.monitor.records import EndRecord, EvalRecord, Record, RunRecord, StepRecord

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values over optimizer steps: `steps` `[n]` ascending, `values` `[n]` finite float64."""

    steps: NDArray[np.int64]
    values: Floats


@dataclasses.dataclass(frozen=True)
class History:
    """The records of one run. Any part may be missing: a run that was killed, was never evaluated, or averages.

    Args:
        info: the last run record, or `None`.
        steps, evals: the records of steps and evaluations, in order.
        end: the end record, or `None` where the run was killed or is still going.
    """

    info: RunRecord | None
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    end: EndRecord | None

    @functools.cached_property
    def languages(self) -> tuple[str, ...]:
        """The languages in the order of the run record, or in the order of their appearance without one."""
        if self.info is not None:
            return tuple(self.info["languages"])
        named = [step.get("weights") or step["language_loss"] for step in self.steps]
        return tuple(dict.fromkeys(language for names in named for language in names))

    @functools.cached_property
    def evaluated(self) -> tuple[str, ...]:
        """The languages with a held-out result: those of the training first, then any others."""
        seen = dict.fromkeys(language for record in self.evals for language in record["bits_per_byte"])
        return tuple([name for name in self.languages if name in seen] + [n for n in seen if n not in self.languages])

    @functools.cached_property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks; numbered where the run record does not name those of the details."""
        count = self._details[-1].shape[0] if self._details else None
        named = tuple(self.info["blocks"]) if self.info is not None else ()
        return named if count is None or len(named) == count else tuple(f"block {index}" for index in range(count))

    def loss(self, language: str) -> Curve:
        """Training loss of a language, nats per target token."""
        return _curve((step["step"], step["language_loss"].get(language)) for step in self.steps)

    def bits_per_byte(self, language: str) -> Curve:
        """Held-out bits per byte of a language."""
        return _curve((record["step"], record["bits_per_byte"].get(language)) for record in self.evals)

    def weights(self) -> tuple[NDArray[np.int64], Floats]:
        """Returns the n steps that have weights, and the weights `[n, B, K]`, NaN for absent languages."""
        kept = [
            (step["step"], _array([step["weights"][name] for name in self.languages]).T)
            for step in self.steps
            if set(self.languages) <= set(step.get("weights") or {})
        ]
        kept = [(step, weights) for step, weights in kept if weights.shape[0] == len(self.blocks)]
        if not kept:
            return np.zeros(0, np.int64), np.zeros((0, len(self.blocks), len(self.languages)))
        return np.array([step for step, _ in kept]), np.stack([weights for _, weights in kept])

    @functools.cached_property
    def cosine(self) -> Floats:
        """The cosine of every two languages, averaged over the steps that have one: `[B, K, K]`, NaN without any."""
        shape = (len(self.blocks), len(self.languages), len(self.languages))
        return _mean((array for array in self._details if array.shape == shape), shape)

    @functools.cached_property
    def conflict(self) -> Floats:
        """The share of conflicting pairs in each block, averaged over steps: `[B]`, NaN without any."""
        shape = (len(self.blocks),)
        arrays = (_array(step["conflict"]) for step in self.steps if step.get("conflict"))
        return _mean((array for array in arrays if array.shape == shape), shape)

    @functools.cached_property
    def _details(self) -> list[Floats]:
        return [_array(step["cosine"]) for step in self.steps if step.get("cosine")]


def load(path: str | Path) -> History:
    """Reads a metrics file.

    Raises:
        OSError: it cannot be read.
        MetricsError: a line, other than a torn last one, is no record.
    """
    return history(read(path))


def history(records: Iterable[Record]) -> History:
    """Sorts records by kind."""
    by_event: dict[str, list[Any]] = {"run": [], "step": [], "eval": [], "end": []}
    for record in records:
        by_event[record["event"]].append(record)
    return History(
        info=by_event["run"][-1] if by_event["run"] else None,
        steps=tuple(by_event["step"]),
        evals=tuple(by_event["eval"]),
        end=by_event["end"][-1] if by_event["end"] else None,
    )


def mean_curve(curves: Iterable[Curve]) -> tuple[Curve, Floats, Floats]:
    """Averages curves over the steps that all of them have.

    Returns:
        The mean curve, and the least and the greatest value at each of its steps.
    """
    filled = [curve for curve in curves if curve.steps.size]
    if not filled:
        nothing = np.zeros(0)
        return Curve(np.zeros(0, np.int64), nothing), nothing, nothing
    steps = functools.reduce(np.intersect1d, [curve.steps for curve in filled])
    table = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in filled])
    return Curve(steps, table.mean(axis=0)), table.min(axis=0), table.max(axis=0)


def _curve(points: Iterable[tuple[int, float | None]]) -> Curve:
    # A dict keeps the last value of a step that stands there twice.
    kept: Mapping[int, float] = {step: value for step, value in points if value is not None}
    steps = sorted(kept)
    return Curve(np.array(steps, dtype=np.int64), np.array([kept[step] for step in steps], dtype=np.float64))


def _array(values: Any) -> Floats:
    return np.array(values, dtype=np.float64)


def _mean(arrays: Iterable[Floats], shape: tuple[int, ...]) -> Floats:
    total, count = np.zeros(shape), np.zeros(shape)
    for array in arrays:
        known = np.isfinite(array)
        total += np.where(known, array, 0.0)
        count += known
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)
