"""The mixture: how often languages are sampled, where that moves with training (`schedule.adapt: doge`).

Domain reweighting with generalisation estimation (Fan, Pagliardini & Jaggi, DoGE, ICML 2024, algorithm 1): a language
is sampled more where a step on it helps the others. With the Gram of the rows of a window, summed over all blocks, its
score is the mean over the other languages that are there, `s_i = mean_j <g_i, g_j>`, in units of the mean of all
`||g_i||^2`, cut to `[-clip, clip]`. The paper sums over all j, i included, which pays loud languages for their noise:
the diagonal counts here where it is free of that (`gram: cross`), and is left out elsewhere. Then

    log a_i += rate (s_i - mean of s),        p = (1 - mix) softmax(log a) + mix / K

over the languages of the window: those that are absent stay as they are to each other. `rate` is the paper's learning
rate over its mu. It starts at the shares that the temperature gives.

**A probe** is a language that is to be good in the end and of which there is little. It has one place in every window,
and its row steers only: scores are `s_i = <g_i, g_probe>`, and its weight in the combined gradient is 0, whatever the
rule, which is not shown it either.

**When.** What a window takes is decided when its first batch is drawn, by the mixture of that moment, and kept: batches
that a loader has drawn ahead of training keep what they were drawn with. All that was decided of an epoch is in the
state, so that a resumed run draws the same windows again, those that had been drawn ahead included. Every rank decides
alike: what moves the mixture are Grams, which all ranks have to the bit.

An epoch has as many windows as with the shares of its start. No language runs out: it comes round again as often as it
is drawn, and no sample twice in a round.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bucketmoo_ds.data import shares
from bucketmoo_ds.errors import ConfigError

EPOCHS_KEPT = 2  # a loader may have begun the next one


class Mixture:
    """What windows take, and what moves it.

    Args:
        languages: the K names.
        weights: `[K]`, what shares are proportional to at the start.
        places: S, units of a window.
        seed: of the rounding.
        options: `probe`, `rate`, `clip` and `mix`, of `BucketMOOConfig.schedule`.

    Raises:
        ConfigError: a window has no place beside the probe's.
    """

    def __init__(
        self,
        languages: Sequence[str],
        weights: NDArray[np.float64],
        places: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> None:
        self._languages = tuple(languages)
        probe = options.get("probe")
        self._probe = self._languages.index(probe) if probe is not None else None
        self._rate, self._clip, self._mix = (float(options[name]) for name in ("rate", "clip", "mix"))
        self._seed = seed
        self._places = places
        self._free = places - (self._probe is not None)
        if self._free < 1:
            raise ConfigError(
                f'schedule.probe = "{probe}": it takes the one place of a window; raise micro_steps, with affinity = '
                '"micro_step", or leave it out'
            )
        self._sampled = [index for index in range(len(languages)) if index != self._probe]
        chosen = weights[self._sampled]
        self._logs = [round(math.log(each), 12) for each in (chosen / chosen.sum()).tolist()]
        self._credit = [0.0] * len(languages)
        self._decided: dict[int, list[list[int]]] = {}

    @property
    def probabilities(self) -> dict[str, float]:
        """p, by name; 0 for the probe."""
        found = dict.fromkeys(self._languages, 0.0)
        return found | {self._languages[index]: p for index, p in zip(self._sampled, self._p().tolist(), strict=True)}

    def before(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Returns how many units of each language an epoch takes before a window, `[K]`."""
        decided = self._until(epoch, window)[:window]
        return np.array(decided, dtype=np.int64).reshape(window, len(self._languages)).sum(0)

    def counts(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Returns how many units of each language a window takes, `[K]`."""
        return np.array(self._until(epoch, window + 1)[window], dtype=np.int64)

    def move(self, gram: Sequence[Sequence[float]], present: Sequence[int], noisy: Collection[int]) -> None:
        """Moves the shares by the rows of a window.

        Args:
            gram: `[K, K]`, of the rows, summed over all blocks.
            present: the languages that took part.
            noisy: those of them whose noise is on the diagonal.
        """
        there = [index for index in present if index != self._probe]
        size = sum(gram[i][i] for i in there) / max(len(there), 1)
        if self._probe is not None:
            judges: dict[int, list[int]] = {i: [self._probe] if self._probe in present else [] for i in there}
        else:
            judges = {i: [j for j in there if j != i or i not in noisy] for i in there}
        if len(there) < 2 or not size > 0.0 or not all(judges.values()):
            return
        scores = {i: sum(gram[i][j] for j in judges[i]) / len(judges[i]) / size for i in there}
        cut = {i: min(max(score, -self._clip), self._clip) for i, score in scores.items()}
        mean = sum(cut.values()) / len(cut)
        for i, score in cut.items():
            # Rounded, so that no last bit of a machine's arithmetic decides who is rounded up.
            place = self._sampled.index(i)
            self._logs[place] = round(self._logs[place] + self._rate * (score - mean), 12)

    def state_dict(self) -> dict[str, Any]:
        """Returns the shares and what was decided, as plain JSON values."""
        decided = {
            str(epoch): [" ".join(map(str, counts)) for counts in windows] for epoch, windows in self._decided.items()
        }
        return {"logs": list(self._logs), "credit": list(self._credit), "places": self._places, "decided": decided}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. Of a run with windows of another size (a universal checkpoint) only the
        shares mean something.

        Raises:
            ConfigError: it is of another number of languages.
        """
        if len(state["logs"]) != len(self._logs):
            raise ConfigError(
                f"the saved mixture is of {len(state['logs'])} sampled languages, here {len(self._logs)}: resume with "
                "the saved schedule.probe and languages"
            )
        self._logs = [float(each) for each in state["logs"]]
        self._decided, self._credit = {}, [0.0] * len(self._languages)
        if state["places"] != self._places:
            return
        self._credit = [float(each) for each in state["credit"]]
        self._decided = {
            int(epoch): [[int(each) for each in counts.split()] for counts in windows]
            for epoch, windows in state["decided"].items()
        }

    def _until(self, epoch: int, windows: int) -> list[list[int]]:
        """Returns what was decided of an epoch, that many windows of it at least."""
        if epoch not in self._decided:
            kept = sorted(each for each in self._decided if each < epoch)[-EPOCHS_KEPT + 1 :]
            self._decided = {each: self._decided[each] for each in kept} | {epoch: []}
        decided = self._decided[epoch]
        while len(decided) < windows:
            decided.append(self._decide(epoch, len(decided)))
        return decided

    def _decide(self, epoch: int, window: int) -> list[int]:
        share = np.zeros(len(self._languages))
        share[self._sampled] = shares.of_places(self._p(), self._free)
        if self._probe is not None:
            share[self._probe] = 1.0
        counts, fraction = shares.split(share)
        number = self._places - int(counts.sum())
        if number:
            draws = shares.generator(self._seed, shares.MIXTURE, epoch, window).random(len(share))
            credit = np.array(self._credit)
            counts[shares.rounded_up(fraction, number, credit, draws)] += 1
            self._credit = [round(each, 12) for each in credit.tolist()]
        return [int(each) for each in counts]

    def _p(self) -> NDArray[np.float64]:
        """Returns the probabilities of the languages that are sampled by them."""
        logs = np.array(self._logs)
        softmax = np.exp(logs - logs.max())
        p = (1.0 - self._mix) * softmax / softmax.sum() + self._mix / len(logs)
        return np.maximum(np.round(p, 12), 1e-12)
