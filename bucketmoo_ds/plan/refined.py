"""`granularity: refined`: blocks that only the languages count on which use them, and no cycle between blocks and
languages (docs/theory.md, section 5; Hu & Yu, Leveraging Variable Sparsity to Refine Pareto Stationarity, ICLR 2025).

Who uses what is told, by patterns of parameters' names. The blocks of another granularity are first cut by who uses
their parameters; then those on a cycle of the graph that joins blocks to languages are merged. Two blocks that share
two languages are on one: what all languages share becomes one block, and what belongs to one language stays apart.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of

NAME = "refined"
USED_BY = f"{SECTION}.granularity_options.used_by"
WAY_OUT = (
    'name who uses what, such as {"used_by": {"adapters.de.*": ["de"]}} (bucketmoo_ds.probe_dependencies finds it); '
    'where all languages use everything, refined blocks are granularity "model"'
)


@dataclasses.dataclass(frozen=True)
class Refined:
    """Who uses which parameters.

    Args:
        languages: of the run, in the order of their indices.
        base: the granularity whose blocks are cut and merged.
        used_by: by pattern (`fnmatch`, over the whole name of a parameter), the languages that use the parameters it
            matches, and no other does. What no pattern matches is used by all.
    """

    languages: tuple[str, ...]
    base: str
    used_by: Mapping[str, frozenset[int]]

    @classmethod
    def from_config(cls, config: BucketMOOConfig) -> Refined:
        """Reads `granularity_options`; whether `base` exists is for the caller to find out.

        Raises:
            ConfigError: an unknown option, `used_by` that is missing or names no language or an unknown one.
        """
        options, known = config.granularity_options, ("base", "used_by")
        for name in options:
            if name not in known:
                expected = f"unknown, expected {one_of(known)}{did_you_mean(name, known)}"
                raise ConfigError(f"{SECTION}.granularity_options.{name}: {expected}")
        base, used_by = options.get("base", "layer"), options.get("used_by")
        if not isinstance(base, str):
            raise ConfigError(f"{SECTION}.granularity_options.base = {base!r}: expected the name of a granularity")
        if not isinstance(used_by, Mapping) or not used_by:
            raise ConfigError(f"{USED_BY} = {used_by!r}: expected patterns with their languages; {WAY_OUT}")
        found = {}
        for pattern, users in used_by.items():
            if isinstance(users, str) or not isinstance(users, Sequence) or not users:
                raise ConfigError(f'{USED_BY}["{pattern}"] = {users!r}: expected a list of languages, at least one')
            for language in users:
                if language not in config.languages:
                    meant = did_you_mean(str(language), config.languages)
                    raise ConfigError(f'{USED_BY}["{pattern}"]: "{language}" is not in {SECTION}.languages{meant}')
            found[str(pattern)] = frozenset(map(config.languages.index, users))
        return cls(config.languages, base, found)

    def users(self, parameters: Sequence[str]) -> list[frozenset[int]]:
        """Returns the languages that use each parameter.

        Raises:
            ConfigError: a pattern matches no parameter, or two say different things of one.
        """
        everybody = frozenset(range(len(self.languages)))
        said_by: dict[str, str] = {}
        for pattern, users in self.used_by.items():
            matching = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
            if not matching:
                raise ConfigError(f'{USED_BY}["{pattern}"]: matches no trained parameter; take it out, or mend it')
            for name in matching:
                before = said_by.setdefault(name, pattern)
                if self.used_by[before] != users:
                    raise ConfigError(
                        f'{USED_BY}: "{before}" and "{pattern}" both match "{name}" and name different languages; make '
                        "one of them narrower"
                    )
        return [self.used_by[said_by[name]] if name in said_by else everybody for name in parameters]

    def blocks(self, parameters: Sequence[str], labels: Sequence[str]) -> tuple[list[str], dict[str, tuple[int, ...]]]:
        """Cuts and merges the blocks of the base.

        Args:
            parameters: the names of all trained parameters, in the model's order.
            labels: the name of the base block of each.

        Returns:
            The name of the block of each parameter; and, by that name, the languages that do not use it.

        Raises:
            ConfigError: see `users`.
        """
        users = self.users(parameters)
        users_of_base: dict[str, set[frozenset[int]]] = {}
        for label, of in zip(labels, users, strict=True):
            users_of_base.setdefault(label, set()).add(of)
        cut = [
            f"{label} ({self._names(of)})" if len(users_of_base[label]) > 1 else label
            for label, of in zip(labels, users, strict=True)
        ]
        users_of = dict(zip(cut, users, strict=True))
        first = dict(zip(users_of, merge_cycles(list(users_of.values())), strict=True))
        members: dict[int, list[str]] = {}
        for name, number in first.items():
            members.setdefault(number, []).append(name)
        merged: dict[str, str] = {}
        unused: dict[str, tuple[int, ...]] = {}
        for names in members.values():
            block = names[0] if len(names) == 1 else f"{names[0]} + {len(names) - 1} more"
            merged |= dict.fromkeys(names, block)
            counting = frozenset[int]().union(*(users_of[name] for name in names))
            unused[block] = tuple(index for index in range(len(self.languages)) if index not in counting)
        return [merged[name] for name in cut], unused

    def _names(self, users: frozenset[int]) -> str:
        if len(users) == len(self.languages):
            return "all"
        return ", ".join(self.languages[index] for index in sorted(users))


def merge_cycles(users: Sequence[frozenset[int]]) -> list[int]:
    """Returns the number of the merged block of each block: the finest merging that leaves no cycle in the graph whose
    edges join a block to each of its users. There is one such merging: docs/theory.md, section 5.

    Two blocks that a language joins lie on a cycle through it where they are also connected without it.

    Args:
        users: the languages of each block, at least one.
    """
    merged = _Joined(len(users))
    for language in frozenset().union(*users):
        without = _Joined(len(users))
        first_of: dict[int, int] = {}
        for block, of in enumerate(users):
            for other in of - {language}:
                without.join(first_of.setdefault(other, block), block)
        first_in: dict[int, int] = {}
        for block, of in enumerate(users):
            if language in of:
                merged.join(first_in.setdefault(without.root(block), block), block)
    return [merged.root(block) for block in range(len(users))]


class _Joined:
    """Disjoint sets of the numbers below `count`."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = number = self._parent[self._parent[number]]
        return number

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low
