"""What ranks have to agree on, and how they find out that they do not: every check raises on every rank, or on none."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.errors import DisagreementError, LanguageError


def tell_ranks(
    exchange: Exchange, numbers: Sequence[int], error: str, position: Mapping[str, int]
) -> list[list[int]]:
    """Tells all ranks the numbers of this one, and learns theirs.

    Args:
        exchange: the ranks.
        numbers: what this rank has to say; 64-bit, signed.
        error: why it has nothing to say; empty for none.
        position: numbers that have to be the same on all ranks, by what they are called in a message.

    Returns:
        The numbers of every rank, rank by rank.

    Raises:
        LanguageError: on every rank, if one of them had an error.
        DisagreementError: on every rank, if their positions differ.
    """
    rows = exchange.gather_numbers([bool(error), *position.values(), *numbers])
    if any(row[0] for row in rows):
        texts = exchange.gather_text(error)
        raise LanguageError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text))
    for column, name in enumerate(position, start=1):
        if len({row[column] for row in rows}) > 1:
            values = ", ".join(f"rank {rank}: {row[column]}" for rank, row in enumerate(rows))
            raise DisagreementError(f"ranks disagree about the {name} ({values}): run one script on all")
    return [row[1 + len(position) :] for row in rows]


def check_equal(exchange: Exchange, data: bytes, message: str) -> None:
    """Raises `DisagreementError` on every rank where `data` is not the same on all of them."""
    if len({row[0] for row in exchange.gather_numbers([digest(data)])}) > 1:
        raise DisagreementError(message)


class Contributions:
    """For which parameters this rank had gradients in the micro-steps of a window."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._words: list[list[int]] = []

    def clear(self) -> None:
        """Starts the next window."""
        self._words = []

    def add(self, flags: Sequence[bool]) -> None:
        """Notes a micro-step: for each parameter, whether it got a gradient."""
        bits = bytearray(8 * -(-len(flags) // 64))
        for index, flag in enumerate(flags):
            bits[index // 8] |= flag << (index % 8)
        self._words.append(list(struct.unpack(f"<{len(bits) // 8}q", bits)))

    def check(self, exchange: Exchange) -> None:
        """Stops where ranks had gradients of different parameters, which plain ZeRO-1/2 adds up silently wrong.

        Raises:
            DisagreementError: on every rank; the message names a parameter and the ranks that had it.
        """
        words = [word for step in self._words for word in step]
        own = digest(struct.pack(f"<{len(words)}q", *words))
        if len({row[0] for row in exchange.gather_numbers([own])}) == 1:
            return
        table = exchange.gather_numbers(words)
        column = next(index for index in range(len(words)) if len({row[index] for row in table}) > 1)
        step, word = divmod(column, len(self._words[0]))
        differing = table[0][column] ^ next(row[column] for row in table if row[column] != table[0][column])
        bit = ((differing & -differing) & (2**64 - 1)).bit_length() - 1
        having = [rank for rank, row in enumerate(table) if row[column] >> bit & 1]
        raise DisagreementError(
            f'parameter "{self._names[64 * word + bit]}" got a gradient in micro-step {step} on rank(s) '
            f"{having} only. Ranks must use the same parameters in the same micro-step (ZeRO-1/2 would mix up "
            "gradients of different parameters): use every parameter on every rank, or freeze it"
        )


def digest(data: bytes) -> int:
    """Returns a signed 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
