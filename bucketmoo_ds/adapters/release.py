"""Buckets are handed on in one order, the same on every rank, each exactly once a micro-step, whatever order backward
completes them in and whichever it leaves out: so all ranks start the same collectives in the same order."""

from __future__ import annotations

from collections.abc import Callable

from bucketmoo_ds.comm.exchange import Exchange


class Release:
    """The order, and how far it has come in this micro-step.

    It begins as the plan's. What the first exchange shows of the order in which backward completes buckets is agreed
    upon and kept, so that a complete bucket waits for no other one for long.

    Args:
        count: how many buckets there are.
        exchange: the ranks that agree.
        hand_on: called with a bucket whose turn it is.

    Attributes:
        inside: the bucket that is being completed by the framework right now, and that it is not done with.
    """

    def __init__(self, count: int, exchange: Exchange, hand_on: Callable[[int], None]) -> None:
        self._order = list(range(count))
        self._exchange = exchange
        self._hand_on = hand_on
        self._learned = False
        self.inside: int | None = None
        self.start()

    def start(self) -> None:
        """Expects every bucket once more."""
        self._complete: dict[int, None] = {}  # in the order in which they came
        self._next = 0
        self._left: set[int] = set()
        self.inside = None

    def is_complete(self, bucket: int) -> bool:
        """Whether the bucket has come in this micro-step."""
        return bucket in self._complete

    def has_left(self, bucket: int) -> bool:
        """Whether the bucket was handed on in this micro-step."""
        return bucket in self._left

    def complete(self, bucket: int) -> None:
        """The bucket is complete: it leaves, with those that waited for it, if it is its turn."""
        self._complete[bucket] = None
        self.inside = bucket
        while self._next < len(self._order) and self._order[self._next] in self._complete:
            self._leave()
        self.inside = None

    def finish(self) -> None:
        """Hands on all buckets that are left, complete or not."""
        while self._next < len(self._order):
            self._leave()
        if not self._learned:
            self._learn()

    def _leave(self) -> None:
        bucket = self._order[self._next]
        self._next += 1
        self._left.add(bucket)
        self._hand_on(bucket)

    def _learn(self) -> None:
        """Takes the order of the first rank: ranks of one program complete buckets alike, and must agree."""
        rest = [bucket for bucket in self._order if bucket not in self._complete]
        shown, *order = self._exchange.gather_numbers([len(self._complete), *self._complete, *rest])[0]
        self._order, self._next, self._learned = order, len(order), shown > 0
