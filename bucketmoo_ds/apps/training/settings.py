"""The file that `bucketmoo train` reads, YAML or JSON, as dataclasses: `configs/train.yaml` is a commented example."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bucketmoo_ds.config import SECTION, BucketMOOConfig, check_section_name
from bucketmoo_ds.data.schedule import check_repeat
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is trained; exactly one of `name` and `config`.

    Args:
        name: a folder with a Hugging Face model, or its name on the Hub.
        config: a transformers configuration with its `model_type`; the weights are then random.
        tokenizer: folder or name of the tokenizer, by default that of `name`.
    """

    name: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.config is None):
            raise ConfigError("model: expected either name (a folder, or a name on the Hub) or config")
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError("model.config.model_type: missing; name a model of transformers, such as llama")


_AT_LEAST = {
    "steps": 1,
    "sequence_length": 2,
    "warmup_steps": 0,
    "final_share": 0,
    "weight_decay": 0,
    "temperature": 1,
    "evaluate_every": 0,
    "checkpoint_every": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How it is trained.

    Args:
        steps: optimizer steps (windows).
        sequence_length: tokens of a sequence; text is packed within a language.
        learning_rate: at its highest.
        schedule: what follows the warm-up: `constant`, or `linear` or `cosine` down to `final_share` of the rate.
        warmup_steps: steps from 0 to the highest rate.
        final_share: the last learning rate as a share of the highest.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        temperature: of sampling languages of unequal size: a language is drawn as its size to the power 1/temperature.
        repeat: rounds of a language in an epoch, at most: a number, one for each name, or "auto" to last as long as the
            others. See `data.schedule`, rule 5.
        evaluate_every: steps between two evaluations; 0 evaluates only at the end.
        checkpoint_every: steps between two checkpoints; 0 saves only at the end.
        checkpoint_at_end: whether the end is saved.
        save_on_signal: whether SIGTERM saves a checkpoint at the end of the window, and then ends the run; otherwise
            it ends the run at once.
        seed: of everything random: data order, and dropout.
    """

    steps: int
    sequence_length: int
    learning_rate: float
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_share: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    temperature: float = 1.0
    repeat: Any = 1
    evaluate_every: int = 0
    checkpoint_every: int = 0
    checkpoint_at_end: bool = True
    save_on_signal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in LEARNING_RATE_SCHEDULES:
            raise ConfigError(
                f'training.schedule = "{self.schedule}": expected {one_of(LEARNING_RATE_SCHEDULES)}'
                f"{did_you_mean(self.schedule, LEARNING_RATE_SCHEDULES)}"
            )
        for name, low in _AT_LEAST.items():
            if getattr(self, name) < low:
                raise ConfigError(f"training.{name} = {getattr(self, name)}: expected at least {low}")
        if len(self.betas) != 2 or not all(isinstance(beta, float) and 0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas = {list(self.betas)}: expected two numbers from 0 to below 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate = {self.learning_rate}: expected a number above 0")

    def learning_rate_share(self, step: int) -> float:
        """Returns the learning rate of a step (from 0) as a share of the highest."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        fall = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1.0 - (1.0 - self.final_share) * fall


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Held-out text to measure bits per byte on: a data section of its own (see `corpus.load.DataSpec`).

    Args:
        data: where it is.
        languages: which to measure, also others than those trained on; by default the run's.
        max_bytes: bytes of text a language, at most.
        batch_size: sequences in a forward pass.
    """

    data: Mapping[str, Any]
    languages: tuple[str, ...] | None = None
    max_bytes: int = 50_000
    batch_size: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run.

    Args:
        model, data, training, evaluation: see above; `data` is a `corpus.load.DataSpec`.
        deepspeed: the DeepSpeed JSON, or a path to it; its `bucket_moo` section names the languages. With
            `"enabled": false` the run averages, on the same data in the same order.
        output: folder of the run.
        processes: ranks to start on this machine; ignored under torchrun and DeepSpeed's launcher, which start them.
    """

    model: ModelSettings
    data: Mapping[str, Any]
    training: TrainingSettings
    deepspeed: Mapping[str, Any]
    output: str
    evaluation: EvaluationSettings | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"processes = {self.processes}: expected at least 1")
        check_section_name(self.deepspeed)
        if SECTION not in self.deepspeed:
            raise ConfigError(
                f'deepspeed.{SECTION}: missing; it names the languages ("enabled": false averages their gradients)'
            )
        check_repeat("training.repeat", self.training.repeat, self.moo.languages)

    @property
    def moo(self) -> BucketMOOConfig:
        """The `bucket_moo` section, also where it is switched off."""
        section = dict(self.deepspeed[SECTION])
        BucketMOOConfig.from_section(section)
        return BucketMOOConfig(**section)


def read_settings(path: Path) -> RunSettings:
    """Reads a run's file; paths in it are relative to where the command runs.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown or impossible setting.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: expected settings by name")
    raw = dict(raw)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = _read_json(Path(raw["deepspeed"]))
    settings: RunSettings = _build(RunSettings, raw, "")
    return settings


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed = {str(path)!r}: {error}") from error


def _build(kind: Any, raw: Mapping[str, Any], prefix: str) -> Any:
    """Makes a dataclass of a mapping, nested ones too, with every mistake named by its path."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in raw:
        if name not in fields:
            raise ConfigError(f"{prefix}{name}: unknown setting{did_you_mean(str(name), fields)}")
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and name not in raw:
            raise ConfigError(f"{prefix}{name}: missing")
    values = {name: _convert(hints[name], value, prefix + name) for name, value in raw.items()}
    return kind(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if hint is Any or (value is None and type(None) in options):
        return value
    wanted = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} = {value!r}: expected settings by name")
        return _build(wanted, value, f"{name}.")
    origin = typing.get_origin(wanted) or wanted
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if origin is float and isinstance(value, str):  # YAML 1.1 reads 4e-3 as a string
        try:
            return float(value)
        except ValueError:
            origin = float
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise ConfigError(f"{name} = {value!r}: expected {origin.__name__}, got {type(value).__name__}")
    return value
