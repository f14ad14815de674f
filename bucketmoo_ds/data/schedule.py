"""The schedule: which language each (micro-step, rank) slot of every window trains on.

**The rule.** A window has S places for languages: M micro-steps times W ranks, or W where a rank keeps one language
for the window (`affinity="window"`). What fills a place is a *unit*: one micro-batch, or the M micro-batches of a rank.
Where the L ranks of a node train on one language in a micro-step (`ranks_per_node=L`, which the exchange in two stages
needs), a place is a whole node: there are L times fewer places, and a unit is L times the micro-batches.

1. *Coverage.* A window covers as many languages as it can: all that have data left where S places suffice, else S
   different ones, in rotation.
2. *Share.* With temperature T, language l of n_l samples has the weight n_l^(1/T). Its share of a window is
   proportional to the weight, but, by rule 1, not below 1 unit where the places suffice and not above 1 where they do
   not. (Temperature sampling as in Arivazhagan et al., arXiv 1907.05019: T = 1 follows the sizes, T = infinity
   treats languages alike.)
3. *Rounding.* In each window a language gets its share rounded down or up. Who is rounded up goes by credit: what its
   share promised and it did not get yet, plus a draw from [0, 1) that lets all pairs of languages meet. So nobody
   starves: while all have data, a language is within `MAX_LAG` units of t shares after t windows.
4. *Epoch.* A language that has run out is absent from the remaining windows and the others take its places.
   `epoch_end="longest"` goes on for as long as full windows can be built; `epoch_end="shortest"` ends with the window
   in which the first language runs out, so that every window chooses among all languages.
5. *Rounds.* In a round of a language no sample is used twice. There is one round in an epoch, so that its number of
   windows is the same at every temperature, unless `repeat` allows more: a language that would run out then comes round
   again, up to `repeat` times, for as long as another is in its first round.
6. *Tail.* What fills no unit, or no full window, is left out of the epoch (`tail`). Samples are shuffled anew in each
   epoch, so the tail is the same number but other samples. A second round begins with what the first left out.

How many units of each language a window takes does not depend on the epoch, so all epochs have equally many windows;
in which slots they lie, and which samples they are, does. Every rank computes the same schedule without communication.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bucketmoo_ds.data import shares
from bucketmoo_ds.data.mixture import Mixture
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

Rounds: TypeAlias = int | Literal["auto"]
Repeat: TypeAlias = Rounds | Mapping[str, Rounds]

AFFINITIES = ("micro_step", "window")
EPOCH_ENDS = ("longest", "shortest")

# Rule 3, while the same languages have data. Measured, not proven: 1.7 at most over random shares, 2 to 100 languages.
MAX_LAG = 2.0


class LanguageSchedule:
    """Which language each slot trains on, for all windows of all epochs; see the module for the rule.

    Building it takes some twenty microseconds and 4 K bytes for each window of an epoch.

    Args:
        languages: the K names, in the order of their indices.
        sizes: the number of samples of each language.
        world_size: W, the number of ranks.
        micro_steps: M, the micro-steps of a window (gradient accumulation steps).
        micro_batch_size: samples of a slot.
        temperature: T >= 1; 1 follows the sizes, `math.inf` treats languages alike.
        seed: of everything random; alike on all ranks.
        affinity: `micro_step`: each slot on its own. `window`: a rank keeps one language for the window, so
            that gradients can be exchanged once a window: the other side of `once_a_window`, of ZeRO-0 and of ZeRO-1.
        epoch_end: `longest` or `shortest`, rule 4.
        repeat: rounds of a language in an epoch, at most, rule 5: a number, or one for each name (1 for the others).
            `"auto"` is as many as it takes to last as long as the others.
        ranks_per_node: L, ranks that train on one language in a micro-step: 0 to L-1, L to 2L-1, and so on.
        adapt: the settings of a `Mixture` that moves the shares (`BucketMOOConfig.schedule`); `None` for shares that
            stay. `repeat` then says nothing, and `rounds` and `tail` are those of the shares at the start.

    Attributes:
        mixture: moves the shares, or `None`.
        languages, sizes, world_size, micro_steps, micro_batch_size, temperature, seed, affinity, epoch_end, repeat,
        ranks_per_node: the arguments, checked.

    Raises:
        ConfigError: a value out of range, a language without one unit, or too few samples for one window.
    """

    def __init__(
        self,
        languages: Sequence[str],
        sizes: Sequence[int],
        *,
        world_size: int,
        micro_steps: int,
        micro_batch_size: int,
        temperature: float = 1.0,
        seed: int = 0,
        affinity: str = "micro_step",
        epoch_end: str = "longest",
        repeat: Repeat = 1,
        ranks_per_node: int = 1,
        adapt: Mapping[str, Any] | None = None,
    ) -> None:
        self.languages = tuple(languages)
        self.sizes = tuple(int(size) for size in sizes)
        self.world_size = _whole("world_size", world_size, 1)
        self.micro_steps = _whole("micro_steps", micro_steps, 1)
        self.micro_batch_size = _whole("micro_batch_size", micro_batch_size, 1)
        self.temperature = _temperature(temperature)
        self.seed = _whole("seed", seed, 0)
        self.affinity = _choice("affinity", affinity, AFFINITIES)
        self.epoch_end = _choice("epoch_end", epoch_end, EPOCH_ENDS)
        self.repeat = check_repeat("repeat", repeat, self.languages)
        self.ranks_per_node = _whole("ranks_per_node", ranks_per_node, 1)
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise ConfigError(f"languages = {list(self.languages)}: expected one name or more, each once")
        if len(self.sizes) != len(self.languages):
            raise ConfigError(f"sizes = {list(self.sizes)}: expected one for each of {list(self.languages)}")
        if self.world_size % self.ranks_per_node:
            raise ConfigError(
                f"ranks_per_node = {self.ranks_per_node}: world_size = {self.world_size} is no multiple of it; "
                "expected nodes of equally many ranks, or 1 to give each rank a language of its own"
            )
        self._unit = self.ranks_per_node * (self.micro_steps if affinity == "window" else 1)
        self._units = self._units_of_a_round()
        self._taken = self._spread()
        self.adapt = dict(adapt) if adapt else None
        self.mixture: Mixture | None = None
        if self.adapt is not None:
            if self.repeat not in (1, "auto"):
                raise ConfigError(
                    f'repeat = {self.repeat!r}: with schedule.adapt = "{self.adapt["adapt"]}" a language comes round '
                    "as often as it is drawn; leave repeat out"
                )
            self.mixture = Mixture(self.languages, self._weights(), self.places, self.seed, self.adapt)

    @property
    def windows_per_epoch(self) -> int:
        """The number of windows, that is of optimizer steps, of every epoch."""
        return len(self._taken) - 1

    @property
    def places(self) -> int:
        """S, the places for languages in a window."""
        return self.world_size * self.micro_steps // self._unit

    @property
    def windows_of_one_language(self) -> int:
        """The number of windows of an epoch that hold a single language, with no conflict to resolve."""
        return int((np.count_nonzero(np.diff(self._taken, axis=0), axis=1) == 1).sum())

    @property
    def rounds(self) -> dict[str, float]:
        """How often each language comes round in an epoch (rule 5), in parts of its full units: 1 or less, or `repeat`
        at most."""
        taken = zip(self.languages, self._taken[-1] / self._units, strict=True)
        return {name: float(rounds) for name, rounds in taken}

    @property
    def tail(self) -> dict[str, int]:
        """The samples of each language that an epoch leaves out (rule 6); other samples in each epoch."""
        used = self._taken[-1].astype(np.int64) * self._unit * self.micro_batch_size
        return {name: max(size - int(n), 0) for name, size, n in zip(self.languages, self.sizes, used, strict=True)}

    def table(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Returns the language index of every slot of a window, `[M, W]`.

        Raises:
            IndexError: the epoch has no such window.
        """
        if not 0 <= window < self.windows_per_epoch:
            raise IndexError(f"window {window}: an epoch has windows 0 to {self.windows_per_epoch - 1}")
        if self.mixture is not None:
            return self._placed(self.mixture.counts(epoch, window), epoch, window)
        return self._placed(self._taken[window + 1] - self._taken[window], epoch, window)

    def _placed(self, counts: NDArray[np.integer], epoch: int, window: int) -> NDArray[np.int64]:
        places = np.repeat(np.arange(len(self.languages)), counts)
        nodes = self.world_size // self.ranks_per_node
        by_node = shares.generator(self.seed, shares.PLACES, epoch, window).permutation(places).reshape(-1, nodes)
        by_rank = by_node.repeat(self.ranks_per_node, axis=1)
        return np.tile(by_rank, (self.micro_steps, 1)) if self.affinity == "window" else by_rank

    def taken(self, window: int, epoch: int = 0) -> NDArray[np.int64]:
        """Returns how many micro-batches of each language an epoch takes before this window, `[K]`; where nothing moves
        the shares, as many in every epoch."""
        before = self._taken[window] if self.mixture is None else self.mixture.before(epoch, window)
        return before.astype(np.int64) * self._unit

    def place_in_round(self, language: int, taken: int) -> tuple[int, int]:
        """Returns the round that a language's micro-batch belongs to, and which of that round it is; both from 0.

        Args:
            taken: how many micro-batches the epoch took of the language before this one.
        """
        return divmod(taken, int(self._units[language]) * self._unit)

    def sample_order(self, epoch: int, language: int, round: int = 0) -> NDArray[np.int64]:
        """Returns the order in which a round takes a language's samples, a permutation of `0..n_l - 1`. What a round
        does not fill its full units with comes first in the next one, if that is an odd one."""
        stream = (shares.SAMPLES, epoch, language, *((round,) if round else ()))
        order = shares.generator(self.seed, *stream).permutation(self.sizes[language])
        if round % 2 == 0:
            return order
        used = int(self._units[language]) * self._unit * self.micro_batch_size
        left_out = np.isin(order, self.sample_order(epoch, language, round - 1)[used:])
        return np.concatenate([order[left_out], order[~left_out]])

    def settings(self) -> dict[str, Any]:
        """Returns all parameters as plain JSON values."""
        return {
            "languages": list(self.languages),
            "sizes": list(self.sizes),
            "world_size": self.world_size,
            "micro_steps": self.micro_steps,
            "micro_batch_size": self.micro_batch_size,
            # JSON has no infinity.
            "temperature": self.temperature if math.isfinite(self.temperature) else "inf",
            "seed": self.seed,
            "affinity": self.affinity,
            "epoch_end": self.epoch_end,
            "repeat": self.repeat,
            "ranks_per_node": self.ranks_per_node,
            "adapt": self.adapt,
        }

    def fingerprint(self) -> str:
        """Returns 32 hexadecimal digits that are equal where the parameters and what follows from them are.

        It covers the windows and a few random draws too, since NumPy may change its random streams from one version
        to the next, and ranks or a resumed run would then silently differ.
        """
        digest = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=16)
        digest.update(self._taken.astype("<i8").tobytes())
        digest.update(self._placed(self._taken[1], 0, 0).astype("<i8").tobytes())
        digest.update(shares.generator(self.seed, shares.SAMPLES, 0, 0).permutation(64).astype("<i8").tobytes())
        return digest.hexdigest()

    def _spread(self) -> NDArray[np.integer]:
        """Returns how many units of each language the epoch takes before each window, `[windows + 1, K]`."""
        slots = self.places
        weights = self._weights()
        remaining = _with_rounds(self._units, self._limits() * self._units, weights, slots)
        windows = int(remaining.sum()) // slots
        if windows == 0:
            raise ConfigError(
                f"no window can be filled: the {sum(self.sizes)} samples make {remaining.sum()} full units of "
                f"{self._unit_samples}, and a window takes {slots} (world_size = {self.world_size}, micro_steps = "
                f"{self.micro_steps}); use more samples, or a smaller micro_batch_size or micro_steps"
            )
        rng = shares.generator(self.seed, shares.ROUNDING)
        taken = np.zeros((windows + 1, len(remaining)), dtype=np.int32 if remaining.sum() < 2**31 else np.int64)
        active = np.zeros(len(remaining), dtype=bool)
        for window in range(windows):
            if not np.array_equal(active, remaining > 0):
                active = remaining > 0
                if self.epoch_end == "shortest" and not active.all():
                    return taken[: window + 1].copy()
                share = np.zeros(len(remaining))
                share[active] = shares.of_places(weights[active], slots)
                whole, fraction = shares.split(share)
                rounded_up = slots - int(whole.sum())
                credit = np.zeros(len(remaining))
            counts = whole.copy()
            if rounded_up:
                counts[shares.rounded_up(fraction, rounded_up, credit, rng.random(len(credit)))] += 1
            if (counts > remaining).any():
                counts = _within(counts, remaining, share)
            remaining -= counts
            taken[window + 1] = taken[window] + counts
        return taken

    def _weights(self) -> NDArray[np.float64]:
        """Returns what shares are proportional to, `[K]`."""
        # Rounded, so that no last bit of a machine's `pow` decides who is rounded up.
        weights = (np.array(self.sizes) / max(self.sizes)) ** (1 / self.temperature)
        return np.maximum(np.round(weights, 12), 1e-12)

    def _limits(self) -> NDArray[np.float64]:
        """Returns how often each language may come round in an epoch."""
        given = self.repeat if isinstance(self.repeat, dict) else dict.fromkeys(self.languages, self.repeat)
        return np.array([math.inf if given.get(name, 1) == "auto" else given.get(name, 1) for name in self.languages])

    def _units_of_a_round(self) -> NDArray[np.int64]:
        """Returns how many full units each language has, at least 1."""
        samples = self.micro_batch_size * self._unit
        for name, size in zip(self.languages, self.sizes, strict=True):
            if size < samples:
                raise ConfigError(
                    f'language "{name}" has {size} samples, fewer than one unit of {self._unit_samples}; add samples, '
                    "take the language off `languages`, or use a smaller micro_batch_size"
                )
        return np.array(self.sizes, dtype=np.int64) // samples

    @property
    def _unit_samples(self) -> str:
        of_window = self._unit // self.ranks_per_node
        factors = {"micro_batch_size": self.micro_batch_size}
        factors |= {"micro_steps": of_window} if of_window > 1 else {}
        factors |= {"ranks_per_node": self.ranks_per_node} if self.ranks_per_node > 1 else {}
        samples = f"{' x '.join(factors)} = {' x '.join(map(str, factors.values()))} samples"
        return samples + ' (affinity = "window")' * (of_window > 1)


def _with_rounds(
    units: NDArray[np.int64], limits: NDArray[np.float64], weights: NDArray[np.float64], slots: int
) -> NDArray[np.int64]:
    """Returns how many units an epoch has of each language (rule 5), `[K]`: those of its first round, and of others up
    to its limit where it would run out before the last first round ends, if all got exactly their shares."""
    taken = np.zeros(len(units))
    active = np.ones(len(units), dtype=bool)
    while (first := taken < units * (1 - 1e-9)).any() and (limits > units).any():
        share = shares.of_places(weights[active], slots)
        last_first = np.max(((units - taken)[active] / share)[first[active]])
        until_limit = (limits - taken)[active] / share
        windows = min(last_first, until_limit.min())
        taken[active] += windows * share
        active[active] = until_limit > windows * (1 + 1e-12)
    return np.clip(np.ceil(taken - 1e-6), units, limits).astype(np.int64)


def _within(
    counts: NDArray[np.int64], remaining: NDArray[np.int64], share: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Returns the counts of a window, cut to what each language has left; the others take over, furthest behind first.

    At least as many units as the window has places must remain.
    """
    places = counts.sum()
    counts = np.minimum(counts, remaining)
    while counts.sum() < places:
        counts[np.where(counts < remaining, share - counts, -np.inf).argmax()] += 1
    return counts


def _whole(name: str, value: object, least: int, otherwise: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ConfigError(f"{name} = {value!r}: expected a whole number, {least} or more{otherwise}")
    return int(value)


def _temperature(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
        raise ConfigError(
            f"temperature = {value!r}: expected a number, 1 or more (1 follows the sizes of the languages, "
            "math.inf treats them alike)"
        )
    return float(value)


def check_repeat(name: str, value: object, languages: Sequence[str]) -> Repeat:
    """Returns `repeat` as it was given, with names of `languages` only.

    Raises:
        ConfigError: under this name.
    """
    if isinstance(value, Mapping):
        for language in value:
            if language not in languages:
                raise ConfigError(
                    f'{name}: "{language}" is no language of {list(languages)}{did_you_mean(str(language), languages)}'
                )
        return {language: _rounds(f"{name}.{language}", rounds) for language, rounds in value.items()}
    return _rounds(name, value)


def _rounds(name: str, value: object) -> Rounds:
    return "auto" if isinstance(value, str) and value == "auto" else _whole(name, value, 1, ', or "auto"')


def _choice(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f'{name} = "{value}": unknown, expected {one_of(known)}{did_you_mean(str(value), known)}')
    return value
