"""The schema of `metrics.jsonl`: one JSON object a line, each one of the four records below, told apart by `event`.

A number that is not finite is written as `null`, because `NaN` is not JSON and strings break readers. Lists "by block"
follow `RunRecord.blocks`; matrices of languages follow `RunRecord.languages`.
"""

# No `from __future__ import annotations` here: on Python 3.10 and 3.11 it hides `NotRequired` from `__required_keys__`.
from collections.abc import Mapping
from typing import Any, Literal, cast

from typing_extensions import NotRequired, TypedDict

from bucketmoo_ds.errors import BucketMOOError, did_you_mean, one_of


class RunRecord(TypedDict):
    """The first line, and one more after every resume.

    time: start of the run, ISO 8601, UTC. micro_steps: micro-steps of a window. blocks: the names of the B blocks,
    empty where nothing is resolved (`mode` `plain`). config, versions: any JSON object.
    """

    event: Literal["run"]
    time: str
    aggregator: str
    granularity: str
    languages: list[str]
    world_size: int
    micro_steps: int
    mode: Literal["streaming", "deferred", "mixed", "plain"]
    blocks: list[str]
    config: dict[str, Any]
    versions: dict[str, str]


class StepDetail(TypedDict, total=False):
    """The optional part of a step record: B blocks, K languages; `None` for what an absent language leaves open.

    weights: for each language, its weight in every block `[B]`. cosine: `[B][K][K]`. conflict: the share of
    conflicting pairs by block `[B]`. near_zero: languages with a nearly zero row `[B]`. descends: whether every
    present language descends `[B]`. combined_norm, mean_norm: of the combined gradient and of the mean row `[B]`.
    fresh: whether the weights were solved with new Grams, without which there is no more to say of a window.
    """

    weights: dict[str, list[float | None]]
    cosine: list[list[list[float | None]]]
    conflict: list[float | None]
    near_zero: list[int]
    descends: list[bool | None]
    combined_norm: list[float | None]
    mean_norm: list[float | None]
    fresh: bool


class StepRecord(StepDetail):
    """One window, written after its optimizer step.

    step: optimizer steps done, from 1. loss: mean loss in nats per target token. grad_norm: before clipping, `None`
    where the framework does not tell. seconds, tokens, language_tokens: over all ranks, since the line before (which
    is this window, unless the writer leaves steps out). skipped: the optimizer took no step (overflow). nonfinite:
    the (language, bucket) pairs whose rows were not finite. language_loss: nats per target token; absent languages
    are left out or `None`.
    """

    event: Literal["step"]
    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    seconds: float
    tokens: int
    skipped: bool
    nonfinite: list[list[str | int]]
    language_loss: dict[str, float | None]
    language_tokens: dict[str, int]


class EvalRecord(TypedDict):
    """One evaluation after `step` optimizer steps. bits_per_byte: held-out text, for each language; lower is better."""

    event: Literal["eval"]
    step: int
    bits_per_byte: dict[str, float | None]


class EndRecord(TypedDict):
    """The last line of a run that was not killed. seconds: of the whole run. counters: any numbers worth keeping."""

    event: Literal["end"]
    step: int
    seconds: float
    counters: NotRequired[dict[str, int | float]]


Record = RunRecord | StepRecord | EvalRecord | EndRecord
DETAIL_KEYS: frozenset[str] = frozenset(StepDetail.__optional_keys__)
SCHEMA: dict[str, Any] = {"run": RunRecord, "step": StepRecord, "eval": EvalRecord, "end": EndRecord}


class MetricsError(BucketMOOError, ValueError):
    """A record that is not of the schema, or a metrics file that holds something else than whole records."""


def check(record: Mapping[str, Any]) -> Record:
    """Returns `record` as what its `event` says it is.

    Raises:
        MetricsError: an unknown event, a missing or an unknown key, or a `step` that is no whole number.
    """
    event = record.get("event")
    if event not in SCHEMA:
        raise MetricsError(f"event = {event!r}: unknown, expected {one_of(SCHEMA)}")
    required, optional = SCHEMA[event].__required_keys__, SCHEMA[event].__optional_keys__
    for key in record:
        if key not in required and key not in optional:
            raise MetricsError(f'a "{event}" record has no key "{key}"{did_you_mean(str(key), required | optional)}')
    missing = sorted(required - record.keys())
    if missing:
        raise MetricsError(f'a "{event}" record needs the key{"s" * (len(missing) > 1)} {", ".join(missing)}')
    step = record.get("step", 0)
    if isinstance(step, bool) or not isinstance(step, int):
        raise MetricsError(f'step = {step!r} in a "{event}" record: expected a whole number')
    return cast(Record, record)
