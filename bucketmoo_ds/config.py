"""`BucketMOOConfig`: the one schema behind the DeepSpeed JSON section, the keyword arguments and the command line."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

T = TypeVar("T")

SECTION = "bucket_moo"
MAX_LANGUAGES = 512  # a Gram has their square of numbers; from 65 present in a window on, everything is slower

CHOICES: dict[str, tuple[str, ...]] = {
    "weighting": ("language", "token"),
    "normalize": ("none", "l2", "loss", "loss_l2"),
    "rescale": ("none", "mean"),
    "gram": ("plain", "cross"),
    "mode": ("auto", "streaming", "deferred", "mixed"),
    "exchange": ("auto", "flat", "two_stage"),
    "row_storage": ("float32", "bfloat16", "host"),
}

BY_LOSS = ("loss", "loss_l2")  # the values of `normalize` that need each language's loss

# Settings for which "auto" is a value; it is an error for all others.
AUTOMATIC = ("mode", "gram_every", "exchange", "backend", "shift_labels")


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
        preference: a positive number for each language, by name or in the order of `languages`; 1 each by default. Rows
            are multiplied by it, divided by its mean over the languages present, before the rule combines them: `mean`
            becomes the weighted mean. What a rule makes of longer rows differs (docs/theory.md, section 4).
        normalize: what the rows of a block are divided by before the rule sees them: `l2` their norms, `loss` their
            languages' mean losses, `loss_l2` both. `none`, the default, leaves them as they are: a norm carries
            information, and the methods' guarantees are stated for the plain gradients.
        rescale: `mean` scales the combined gradient of a block to the norm of its mean row, so that a learning rate
            tuned for averaging stays meaningful. `none`, the default, keeps the norm that the method gives.
        weight_smoothing: the share in [0, 1) that the moving average of each language's weight in a block keeps when
            new ones come (CR-MOGM). 0, the default, takes them as the rule gives them.
        gram: what stands on a Gram's diagonal. `plain`: the squared lengths of the rows, which noise makes longer.
            `cross`: products of two halves of a language's micro-batches, which noise does not; twice the rows in
            memory where they are kept. Mode `mixed` always has the latter.
        mode: `streaming` resolves each bucket as it arrives and keeps nothing; `deferred` keeps the rows of the
            window and resolves all blocks at the boundary; `auto` streams where that is possible. `mixed`:
            micro-batches mix languages, and weights come from Grams of earlier windows (`bucketmoo_ds.mixed`).
        gram_every: the windows from one Gram to the next; between, the weights of the last are used, and languages that
            had none get their even share. `auto`: 8 in mode `mixed`, and 1 elsewhere.
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
        schedule: how the sampling of languages moves: `{"adapt": "doge"}`, with `probe`, a language that steers it and
            is not trained on, `rate` = 0.1, `clip` = 1.0 and `mix` = 0.05 (`bucketmoo_ds/data/mixture.py`). Empty, the
            default, leaves shares as the sampler has them.
        seed: seeds everything random in a method (PCGrad's orders), alike on all ranks.

    Raises:
        ConfigError: an unknown setting, a value of the wrong type or out of range; the message names the setting.
    """

    languages: tuple[str, ...]
    enabled: bool = True
    aggregator: str = "upgrad"
    aggregator_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    granularity: str = "bucket"
    granularity_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weighting: str = "language"
    preference: Mapping[str, float] | Sequence[float] = ()
    normalize: str = "none"
    rescale: str = "none"
    weight_smoothing: float = 0.0
    gram: str = "plain"
    mode: str = "auto"
    gram_every: int | str = "auto"
    smoothing: float = 0.9
    exchange: str = "auto"
    ranks_per_node: int = 0
    row_storage: str = "float32"
    backend: str = "auto"
    language_key: str = "language"
    shift_labels: bool | None = None
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in AUTOMATIC and getattr(self, field.name) == "auto":
                raise ConfigError(
                    f'{SECTION}.{field.name} = "auto": has no automatic value; write the value, or leave it out'
                )
        object.__setattr__(self, "languages", _languages(self.languages))
        object.__setattr__(self, "preference", _preference(self.preference, self.languages))
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
        _expect_windows("gram_every", self.gram_every)
        for name in ("smoothing", "weight_smoothing"):
            _expect_share(name, getattr(self, name))
        object.__setattr__(self, "schedule", _schedule(self.schedule, self.languages, self.mode))
        if not self.language_key:
            raise ConfigError(f'{SECTION}.language_key = "": expected the name of an entry of a batch')
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f'{SECTION}.{name} = "{value}": unknown, expected {one_of(known)}{did_you_mean(value, known)}'
                )

    @property
    def probe(self) -> int | None:
        """The index of the language that steers the sampling and is not trained on, if there is one."""
        name = self.schedule.get("probe")
        return None if name is None else self.languages.index(name)

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

    def preferred(self, languages: Iterable[int]) -> list[float] | None:
        """Returns the preference of some languages, by index; `None` where all have the same."""
        assert not isinstance(self.preference, Mapping)  # it has been put in order
        if len(set(self.preference)) == 1:
            return None
        return [self.preference[language] for language in languages]

    def to_json(self) -> dict[str, Any]:
        """Returns the section as plain JSON values."""
        return dataclasses.asdict(self) | {
            "languages": list(self.languages),
            "preference": list(self.preference),
        }


def positive_numbers(
    setting: str, value: Mapping[str, float] | Sequence[float]
) -> Mapping[str, float] | Sequence[float]:
    """Returns positive numbers by language.

    Raises:
        ConfigError: they are none.
    """
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        raise ConfigError(
            f'{setting} = {value!r}: expected a number for each language, such as {{"de": 2.0, "fr": 1.0}}'
        )
    for number in value.values() if isinstance(value, Mapping) else value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0.0 < number < math.inf:
            raise ConfigError(
                f"{setting} = {number!r}: expected positive numbers; take a language that counts 0 out of the data"
            )
    return value


def by_language(
    setting: str, value: Mapping[str, float] | Sequence[float], languages: Sequence[str]
) -> tuple[float, ...]:
    """Returns positive numbers by name, or in the order of the languages, in that order.

    Raises:
        ConfigError: they are none, a language is missing, or a name is of none.
    """
    value = positive_numbers(setting, value)
    if isinstance(value, Mapping):
        for name in value:
            if name not in languages:
                raise ConfigError(f"{setting} = {name!r}: no language of this run{did_you_mean(str(name), languages)}")
        missing = [name for name in languages if name not in value]
        if missing:
            raise ConfigError(f"{setting} = {dict(value)}: has no {', '.join(missing)}; name every language")
        return tuple(value[name] for name in languages)
    if len(value) != len(languages):
        raise ConfigError(f"{setting} = {list(value)}: {len(value)} numbers for {len(languages)} languages")
    return tuple(value)


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


def _preference(value: Any, languages: Sequence[str]) -> tuple[float, ...]:
    return (1.0,) * len(languages) if value == () else by_language(f"{SECTION}.preference", value, languages)


_ADAPT: dict[str, Any] = {"adapt": None, "probe": None, "rate": 0.1, "clip": 1.0, "mix": 0.05}


def _schedule(value: object, languages: tuple[str, ...], mode: str) -> dict[str, Any]:
    """Returns the settings of a mixture, whole, or nothing."""
    _expect("schedule", value, Mapping, 'an object, such as {"adapt": "doge"}')
    given = {str(name): each for name, each in dict(value).items()}  # type: ignore[call-overload]
    for name in given:
        if name not in _ADAPT:
            hint = did_you_mean(name, list(_ADAPT))
            raise ConfigError(f"{SECTION}.schedule.{name}: unknown setting{hint} (known: {', '.join(_ADAPT)})")
    if not given:
        return {}
    whole = _ADAPT | given
    if whole["adapt"] != "doge":
        raise ConfigError(f'{SECTION}.schedule.adapt = {whole["adapt"]!r}: expected "doge"; or leave schedule out')
    if whole["probe"] is not None and whole["probe"] not in languages:
        hint = did_you_mean(str(whole["probe"]), languages)
        raise ConfigError(f"{SECTION}.schedule.probe = {whole['probe']!r}: expected one of the languages{hint}")
    if whole["probe"] is not None and len(languages) < 3:
        raise ConfigError(f"{SECTION}.schedule.probe: {len(languages)} languages; expected two or more beside it")
    for name, most in (("rate", float("inf")), ("clip", float("inf")), ("mix", 1.0)):
        _expect(f"schedule.{name}", whole[name], int | float, "a number")
        if isinstance(whole[name], bool) or not 0 < whole[name] <= most:
            raise ConfigError(
                f"{SECTION}.schedule.{name} = {whole[name]!r}: expected a number above 0" + ", at most 1" * (most == 1)
            )
    if mode == "mixed":
        raise ConfigError(
            f'{SECTION}.schedule.adapt: not in mode "mixed", whose batches are not of LanguageBatchSampler\'s making; '
            "leave the mode or schedule out"
        )
    return whole


def _expect(name: str, value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{SECTION}.{name} = {value!r}: expected {expected}, got {type(value).__name__}")


def _expect_windows(name: str, value: object) -> None:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f'{SECTION}.{name} = {value!r}: expected a whole number, 1 or more, or "auto"')


def _expect_share(name: str, value: object) -> None:
    _expect(name, value, int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{SECTION}.{name} = {value!r}: expected a number from 0 to below 1")


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
