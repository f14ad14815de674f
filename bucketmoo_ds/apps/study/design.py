"""What the study compares. Written down before the runs; a scenario or an arm that is added later says so in the docs.

Every arm of a scenario sees the same sequences in the same windows, begins at the same base model, and is given its own
best learning rate: of one geometric grid, tried on seeds that the comparison does not use, and made longer where the
best one lies at its end. Where an arm has variants (temperatures of averaging, signs of static weights), the best is
chosen on the same seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

BASELINE = "averaging"
BASE = "base"  # stands for an arm where the base model itself is measured
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)

GNOME = "gnome-user-docs"
LIBREOFFICE = "libreoffice-help"

_GNOME_LANGUAGES = ("de", "fr", "es", "cs", "ru", "ko", "hu", "pt_BR")
_LIBREOFFICE_LANGUAGES = ("de", "fr", "eu", "ru", "hu", "tr", "ja", "ko")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Args:
        rule: an aggregator, or `None` for the plain gradient of the whole window, of weighted losses where the two
            powers below say so.
        options: of the rule.
        granularity: of its blocks; `random_blocks` deals the parameters out at random, into four.
        rescale: as in the config.
        late: whether a window's weights are those that the rule gives for the window before.
        share, loss: the powers of a language's size, and of its loss at the beginning, that static weights follow.
        repeat: how often a small language comes round in an epoch, at most.
        variants: other settings of this arm, by field, of which the best is chosen.
    """

    name: str
    rule: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    granularity: str = "layer"
    rescale: str = "none"
    late: bool = False
    share: float = 0.0
    loss: float = 0.0
    repeat: int = 4
    variants: tuple[Mapping[str, Any], ...] = ()


_ARMS = (
    Arm(name=BASELINE),
    Arm(name="static by loss", loss=1.0, variants=({"loss": -1.0}, {"loss": 3.0})),
    Arm(name="random weights", rule="random", options={"spread": 0.5}),
    Arm(name="mgda", rule="mgda"),
    Arm(name="mgda rescaled", rule="mgda", rescale="mean"),
    Arm(name="upgrad", rule="upgrad"),
    Arm(name="cagrad", rule="cagrad"),
    Arm(name="dualproj", rule="dualproj"),
    Arm(name="pcgrad", rule="pcgrad"),
    Arm(name="imtl_g", rule="imtl_g"),
    Arm(name="config", rule="config"),
    Arm(name="aligned_mtl", rule="aligned_mtl"),
    Arm(name="nash_mtl", rule="nash_mtl"),
    Arm(name="fairgrad", rule="fairgrad"),
    Arm(name="adasum", rule="adasum"),
    Arm(name="cagrad parameter", rule="cagrad", granularity="parameter"),
    Arm(name="cagrad model", rule="cagrad", granularity="model"),
    Arm(name="cagrad random blocks", rule="cagrad", granularity="random_blocks"),
    Arm(name="upgrad parameter", rule="upgrad", granularity="parameter"),
    Arm(name="upgrad model", rule="upgrad", granularity="model"),
    Arm(name="upgrad random blocks", rule="upgrad", granularity="random_blocks"),
    Arm(name="cagrad late", rule="cagrad", late=True),
    Arm(name="upgrad late", rule="upgrad", late=True),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}

_CORE = (BASELINE, "static by loss", "random weights", "mgda rescaled", "upgrad", "cagrad")


def _told(settings: Any) -> dict[str, Any]:
    """What differs from the defaults, so that a setting that is added later leaves old runs what they are."""
    plain = dataclasses.asdict(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return {name: value for name, value in plain.items() if value and value != defaults[name]}


_NOT_OF_A_RUN = ("name", "summary", "arms", "extra", "groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """Text, base model, optimizer and the arms that are compared on them.

    Args:
        summary: what is special, in a few words.
        corpus: `GNOME` or `LIBREOFFICE`.
        languages: of the fine-tuning, each with a micro-batch in a window while it has data.
        base: languages that the base model was trained on by averaging, for `base_steps` windows.
        model: `small` and `large` are made from a config; `gemma` is pretrained, and its two last layers are trained.
        optimizer: `adamw`, `adamw .9 .999`, `sgd` (momentum .9) or `muon`.
        rate: the middle of the grid of learning rates.
        factor: from one rate of the grid to the next.
        steps: windows of fine-tuning.
        sizes: the share of its text that a language keeps; 1 where it is not named.
        arms: names of arms; `extra` has those of this scenario only.
        groups: languages whose mean is looked at besides that of all.
    """

    name: str
    summary: str
    corpus: str = GNOME
    languages: tuple[str, ...] = _GNOME_LANGUAGES
    base: tuple[str, ...] = ("en",)
    base_steps: int = 120
    model: str = "small"
    optimizer: str = "adamw"
    rate: float = 8e-3
    factor: float = 2.0
    steps: int = 60
    sequences: int = 2
    sequence_length: int = 64
    vocabulary: int = 1024
    sizes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arms: tuple[str, ...] = _CORE
    extra: tuple[Arm, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def digest(self, arm: Arm) -> str:
        """Returns a hash of all that a run of an arm depends on."""
        own = {name: value for name, value in _told(self).items() if name not in _NOT_OF_A_RUN}
        text = json.dumps([own, _told(arm)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def arm(self, name: str) -> Arm:
        """Returns one of the arms."""
        return {BASE: Arm(name=BASE), **ARMS, **{arm.name: arm for arm in self.extra}}[name]

    @property
    def arm_names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.arms, *(arm.name for arm in self.extra if arm.name not in self.arms))


_SMALL_SHARE = 1 / 30
_LOW = ("cs", "ko", "hu", "pt_BR")
_OLD, _NEW = ("de", "fr", "es", "cs", "ru"), ("ko", "hu", "pt_BR")
# By size: the power 1 is what sampling by size does, 0.3 is the customary temperature, 0 treats languages alike.
_TEMPERATURES = (
    {"share": 1.0},
    {"share": 0.3},
    {"share": 1.0, "repeat": 1},
    {"share": 0.3, "repeat": 1},
    {"repeat": 1},
)

_SCENARIOS = (
    Scenario(name="balanced", summary="eight languages of equal size, English base", arms=tuple(ARMS)),
    Scenario(
        name="unbalanced",
        summary="four of the eight languages have a thirtieth of the others' text, and come round up to four times",
        sizes=dict.fromkeys(_LOW, _SMALL_SHARE),
        steps=120,
        arms=tuple(name for name in _CORE if name != BASELINE),
        extra=(Arm(name=BASELINE, variants=_TEMPERATURES),),
        groups={"low-resource": _LOW},
    ),
    Scenario(
        name="adding",
        summary="three languages are added to a model that has five, of which a tenth of the text is replayed",
        base=_OLD,
        base_steps=300,
        steps=120,
        sizes=dict.fromkeys(_OLD, 0.1),
        groups={"old": _OLD, "new": _NEW},
    ),
    Scenario(
        name="late",
        summary="a base that has seen all eight languages",
        base=_GNOME_LANGUAGES,
        base_steps=600,
        rate=4e-3,
    ),
    Scenario(name="adamw .999", summary="AdamW with betas .9, .999", optimizer="adamw .9 .999"),
    Scenario(name="sgd", summary="SGD with momentum .9", optimizer="sgd", rate=0.2),
    Scenario(name="muon", summary="Muon on matrices, AdamW on the rest", optimizer="muon"),
    Scenario(name="large", summary="a model of ten times the parameters", model="large", rate=4e-3),
    Scenario(
        name="libreoffice", summary="other text, other languages", corpus=LIBREOFFICE, languages=_LIBREOFFICE_LANGUAGES
    ),
    Scenario(
        name="gemma",
        summary="a pretrained multilingual model (Gemma 3 270M), its two last layers",
        corpus=LIBREOFFICE,
        languages=_LIBREOFFICE_LANGUAGES,
        base=(),
        base_steps=0,
        model="gemma",
        rate=2e-4,
        steps=40,
    ),
)
SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in _SCENARIOS}
