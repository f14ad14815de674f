"""`BucketMOOConfig`: the one schema behind the DeepSpeed JSON section, the keyword arguments and the command line."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

T = TypeVar("T")

SECTION = "bucket_moo"
MAX_LANGUAGES = 512  # a Gram has their square of numbers; from 65 present in a window on, everything is slower

CHOICES: dict[str, tuple[str, ...]] = {
    "weighting": ("language", "token"),
    "normalize": ("none", "unit"),
    "rescale": ("none", "mean"),
    "mode": ("auto", "streaming", "deferred", "mixed"),
    "exchange": ("auto", "flat", "two_stage"),
    "row_storage": ("float32", "bfloat16", "host"),
}

# Settings for which "auto" is a value; it is an error for all others.
AUTOMATIC = ("mode", "exchange", "backend", "shift_labels")


def _names_checked(cls: type[T]) -> type[T]:
    """Lets a config dataclass refuse unknown and missing names with `ConfigError`, not Python's `TypeError`."""
    plain: Any = cls.__init__

    @functools.wraps(plain)
    def init(self: T, *positional: Any, **settings: Any) -> None:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"{SECTION}.{name}: unknown setting{did_you_mean(name, known)} (known: {', '.join(known)})"
                )
        if "languages" not in settings and not positional:
            raise ConfigError(f'{SECTION}.languages: missing; expected the list of languages, such as ["de", "fr"]')
        plain(self, *positional, **settings)

    cls.__init__ = init  # type: ignore[assignment]
    return cls


@_names_checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketMOOConfig:
    """What a run with bucket-level multi-objective optimization (MOO) needs to know.

    Args:
        languages: the K languages, at most 512, in the order of their indices 0..K-1. Every micro-batch is of one of
            them.
        enabled: `False` leaves the framework exactly as it is.
        aggregator: the rule from a Gram to weights, one that `bucketmoo_ds.aggregate.names()` lists, or `torchjd:NAME`.
        aggregator_options: options of that rule, such as `{"c": 0.4}` for `cagrad`.
        granularity: the block on which a conflict is resolved: `bucket`, `parameter`, `layer`, `model`, `refined`, or a
            registered one.
        granularity_options: of `refined`: `used_by`, which languages use the parameters of a pattern, as in
            `{"used_by": {"adapters.de.*": ["de"]}}`, and `base`, whose blocks are cut and merged (`layer`).
        weighting: `language`: a row is the gradient of the mean loss per target token of its language. `token`: the
            same row times its share of the window's tokens and the number of languages present, so that `mean` is
            the average over all tokens whatever the counts.
        normalize: `unit` scales the rows of a block to norm 1 before the rule sees them. `none`, the default, keeps
            their norms: a norm carries information, and the methods' guarantees are stated for the plain gradients.
        rescale: `mean` scales the combined gradient of a block to the norm of its mean row, so that a learning rate
            tuned for averaging stays meaningful. `none`, the default, keeps the norm that the method gives.
        mode: `streaming` resolves each bucket as it arrives and keeps nothing; `deferred` keeps the rows of the
            window and resolves all blocks at the boundary; `auto` streams where that is possible. `mixed`:
            micro-batches mix languages, and weights come from Grams of earlier windows (`bucketmoo_ds.mixed`).
        gram_every: in mode `mixed`, the windows from one Gram to the next.
        smoothing: in mode `mixed`, the share in [0, 1) that the running mean of Grams keeps when a new one comes.
        exchange: how gradients travel. `flat`: every rank sends every other one its slice. `two_stage`: they are added
            up among the ranks of a node, which must train on one language in a micro-step, and what is left is
            exchanged across nodes: the same bytes in all, and far fewer between nodes. `auto`: two stages in every
            micro-step whose languages allow it.
        ranks_per_node: ranks that share a fast connection, consecutive in the group of all ranks; 0 asks torchrun's
            `LOCAL_WORLD_SIZE`.
        row_storage: where deferred mode keeps the rows of a window: `float32` and `bfloat16` on the device, `host` as
            float32 in host memory.
        backend: which implementation of the ops runs: `auto` or a name that `bucketmoo doctor` lists.
        language_key: the entry of a batch that names its language; it is taken off before the model sees the batch.
        shift_labels: whether the model predicts `labels[..., 1:]`, for counting targets. `None`, or `auto`, asks the
            model: encoder-decoders, masked language models and token classifiers do not, all others do.
        seed: seeds everything random in a method (PCGrad's orders), alike on all ranks.

    Raises:
        ConfigError: an unknown setting, a value of the wrong type or out of range; the message names the setting.
    """

    languages: tuple[str, ...]
    enabled: bool = True
    aggregator: str = "mgda"
    aggregator_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    granularity: str = "bucket"
    granularity_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weighting: str = "language"
    normalize: str = "none"
    rescale: str = "none"
    mode: str = "auto"
    gram_every: int = 8
    smoothing: float = 0.9
    exchange: str = "auto"
    ranks_per_node: int = 0
    row_storage: str = "float32"
    backend: str = "auto"
    language_key: str = "language"
    shift_labels: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in AUTOMATIC and getattr(self, field.name) == "auto":
                raise ConfigError(
                    f'{SECTION}.{field.name} = "auto": has no automatic value; write the value, or leave it out'
                )
        object.__setattr__(self, "languages", _languages(self.languages))
        for name in ("aggregator_options", "granularity_options"):
            _expect(name, getattr(self, name), Mapping, "an object of option names and values")
            object.__setattr__(self, name, dict(getattr(self, name)))
        if self.shift_labels == "auto":
            object.__setattr__(self, "shift_labels", None)
        _expect("enabled", self.enabled, bool, "true or false")
        _expect("shift_labels", self.shift_labels, bool | None, 'true, false or "auto"')
        for name in ("aggregator", "granularity", "backend", *CHOICES):
            _expect(name, getattr(self, name), str, "a name in quotes")
        _expect("language_key", self.language_key, str, "the name of an entry of a batch")
        for name in ("seed", "ranks_per_node"):
            value = getattr(self, name)
            _expect(name, value, int, "a whole number")
            if isinstance(value, bool) or not 0 <= value < 2**63:
                raise ConfigError(f"{SECTION}.{name} = {value!r}: expected a whole number from 0 to 2^63 - 1")
        if isinstance(self.gram_every, bool) or not isinstance(self.gram_every, int) or self.gram_every < 1:
            raise ConfigError(f"{SECTION}.gram_every = {self.gram_every!r}: expected a whole number, 1 or more")
        _expect("smoothing", self.smoothing, int | float, "a number")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"{SECTION}.smoothing = {self.smoothing!r}: expected a number from 0 to below 1")
        if not self.language_key:
            raise ConfigError(f'{SECTION}.language_key = "": expected the name of an entry of a batch')
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f'{SECTION}.{name} = "{value}": unknown, expected {one_of(known)}{did_you_mean(value, known)}'
                )

    @classmethod
    def from_section(cls, section: object) -> BucketMOOConfig | None:
        """Reads the value of the JSON's `bucket_moo` key.

        Returns:
            The configuration, or `None` where the section is absent (`None`) or says `"enabled": false`.

        Raises:
            ConfigError: unknown keys, wrong types, impossible values. A disabled section is checked all the same, so
                that it does not break on the day it is switched on.
        """
        if section is None:
            return None
        if not isinstance(section, Mapping):
            raise ConfigError(f'{SECTION} = {section!r}: expected an object, such as {{"languages": ["de", "fr"]}}')
        config = cls(**{str(name): value for name, value in section.items()})
        return config if config.enabled else None

    def to_json(self) -> dict[str, Any]:
        """Returns the section as plain JSON values."""
        return dataclasses.asdict(self) | {
            "languages": list(self.languages),
        }


def check_section_name(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where a top-level key of a DeepSpeed JSON looks like a misspelt `bucket_moo`.

    DeepSpeed accepts any unknown top-level key without a word, so that a misspelt section would train by averaging.
    """
    for key in config:
        if key != SECTION and _is_near(str(key)):
            raise ConfigError(f'"{key}": not a DeepSpeed setting; did you mean "{SECTION}"?')


# What people put before and behind the name. "moo" is a word of nobody else's; "moe" is DeepSpeed's, one letter away.
_BUCKET = r"bucket(ed|s|ing)?(level|wise)?"
_NAME = rf"({_BUCKET})?moo|moobuckets?|{_BUCKET}multiobjective(optimi[sz]ation)?"
_BEFORE = r"(ds|deepspeed)?"
_BEHIND = r"(ds|deepspeed|config|configuration|cfg|settings?|section|options?|params?|args?)*"


def _is_near(name: str) -> bool:
    """Whether a name can only be meant for our section: spelt or decorated otherwise, or with one typing mistake."""
    lower = name.lower()
    folded = re.sub("[^a-z0-9]", "", lower)
    return (
        re.fullmatch(f"{_BEFORE}({_NAME}){_BEHIND}", folded) is not None
        or "moo" in re.split("[^a-z0-9]+", lower)
        or _one_typo(re.sub(f"{_BEHIND}$", "", folded), "bucketmoo")
        or _one_typo(folded, "bucketmoo")
    )


def _languages(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f'{SECTION}.languages = {value!r}: expected a list of names, such as ["de", "fr"]')
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{SECTION}.languages: {name!r} is not a name; expected strings that are not empty")
    if not names:
        raise ConfigError(f"{SECTION}.languages = []: expected at least one language")
    if len(names) > MAX_LANGUAGES:
        raise ConfigError(
            f"{SECTION}.languages: {len(names)} names; expected at most {MAX_LANGUAGES}: put languages together"
        )
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{SECTION}.languages: "{name}" stands there {names.count(name)} times; name it once')
    return names


def _expect(name: str, value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{SECTION}.{name} = {value!r}: expected {expected}, got {type(value).__name__}")


def _one_typo(word: str, target: str) -> bool:
    """Whether one insertion, deletion, replacement or swap of neighbours turns `word` into `target`."""
    if abs(len(word) - len(target)) > 1 or word == target:
        return False
    head = 0
    while head < min(len(word), len(target)) and word[head] == target[head]:
        head += 1
    rest, rest_target = word[head:], target[head:]
    return (
        rest[1:] == rest_target[1:]
        or rest[1:] == rest_target
        or rest == rest_target[1:]
        or (rest[:2] == rest_target[:2][::-1] and rest[2:] == rest_target[2:])
    )
