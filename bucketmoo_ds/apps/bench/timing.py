"""Times calls that take turns: the same noise meets all of them, so that their ratios say more than their times."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from bucketmoo_ds.apps.bench.device import MEBI, cache_bytes

Call = Callable[[], object]

FLUSHES = {"cpu": 1, "cuda": 4}  # on a GPU half a millisecond: longer than the host takes to prepare a call
FEWEST_TURNS = 3  # the least from which percentiles say anything
SLOW = 1.0  # seconds: a call that takes longer is not held to that


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call, in the order of the turns. A slow call is left out of later turns."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile, interpolated between the closest ranks."""
        if len(self.milliseconds) == 1:
            return self.milliseconds[0], self.milliseconds[0]
        fifths = statistics.quantiles(self.milliseconds, n=5, method="inclusive")
        return fifths[0], fifths[-1]

    def ratio_to(self, other: Times) -> float:
        """Returns the median, over the turns of both, of this call's time by the other's in the same turn."""
        pairs = zip(self.milliseconds, other.milliseconds, strict=False)
        return statistics.median(mine / theirs for mine, theirs in pairs)


class Stopwatch:
    """Times a call on a device, after making sure of what its caches hold.

    Args:
        device: where the calls run. On a GPU, events on the current stream measure them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Read, not written: nothing is left that would have to be written back during the call.
        size = max(2 * cache_bytes(device), (512 if device.type == "cuda" else 64) * MEBI)
        self._other = torch.ones(size // 4, device=device)

    def milliseconds(self, call: Call, *, warm: bool = False) -> float:
        """Returns how long a call took, its data in no cache, or, if `warm`, right after the same call."""
        for _ in range(FLUSHES[self.device.type]):
            self._other.sum()
        if warm:
            call()
        if self.device.type == "cuda":
            # Not waited for: the GPU is still busy with the above while the host prepares the launches of the call.
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


def take_turns(
    calls: Mapping[str, Call], watch: Stopwatch, *, repeats: int, seconds: float, warm: Sequence[str] = ()
) -> dict[str, Times]:
    """Times calls against each other: in each turn every call once, after one call of each that does not count.

    Args:
        calls: what is timed, by name.
        watch: what times.
        repeats: the most turns.
        seconds: about how long all of it may take; the calls share it evenly, and a slow one has fewer turns. At
            least three turns are taken of a call of less than a second, and one of any.
        warm: the names of calls whose data may lie in cache.

    Returns:
        The times, by name.
    """
    share = seconds / len(calls)
    turns = {}
    for name, call in calls.items():
        if watch.device.type == "cuda":
            call()  # compiles: says nothing about how long a turn takes
        begin = time.perf_counter()
        watch.milliseconds(call)
        cost = time.perf_counter() - begin
        turns[name] = min(repeats, max(int(share / cost), FEWEST_TURNS if cost < SLOW else 1))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(turns.values())):
        for name, call in calls.items():
            if turn < turns[name]:
                found[name].append(watch.milliseconds(call, warm=name in warm))
    return {name: Times(tuple(values)) for name, values in found.items()}
