"""Computes added stalls from the arrival times of tokens. Pure: times are arguments, in seconds of one clock."""

import bisect
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and worst of some figures, in milliseconds; None of nothing."""

    median: float | None
    max: float | None

    @classmethod
    def of(cls, milliseconds: Iterable[float]) -> "Spread":
        """The spread of any number of figures."""
        values = [round(value, 1) for value in milliseconds]
        return cls(round(statistics.median(values), 1), max(values)) if values else cls(None, None)


def gaps(times: Sequence[float], since: float = float("-inf")) -> list[tuple[float, float]]:
    """(begin, end) of the gaps between consecutive arrivals that begin at `since` or later."""
    return [(a, b) for a, b in itertools.pairwise(times) if a >= since]


def median_gap_ms(times: Sequence[float], since: float, until: float) -> float | None:
    """The median of the gaps that lie within [since, until]; None when there is none."""
    within = [1e3 * (b - a) for a, b in gaps(times, since) if b <= until]
    return statistics.median(within) if within else None


def longest_gap_ms(times: Sequence[float], begin: float, end: float) -> float | None:
    """The longest gap that overlaps with [begin, end]; None when none does.

    A token that was on its way when the rank died arrives after the kill, so the gap of the failure need not begin
    before the kill: it is the longest of the gap around the kill and the gaps that begin before `end`.
    """
    touching = [1e3 * (b - a) for a, b in gaps(times) if b > begin and a <= end]
    return max(touching, default=None)


def added_stall_ms(times: Sequence[float], begin: float, end: float, *, since: float = float("-inf")) -> float | None:
    """The cost of an interruption within [begin, end] for a stream: its longest gap less its median gap before.

    Gaps before `since` do not count for the median. None for a stream without tokens before, or after.
    """
    usual, longest = median_gap_ms(times, since, begin), longest_gap_ms(times, begin, end)
    return None if usual is None or longest is None else longest - usual


def goodput_loss(
    times: Iterable[float], begin: float, *, since: float, window: float = 2.0, share: float = 0.95
) -> tuple[float, float] | None:
    """The cost of an interruption at `begin` for all streams: (seconds until tokens arrive at `share` of their usual
    rate for a window, tokens missing until then). `times` are those of all tokens; the usual rate is that of
    [since, begin]. None when there is no such rate, or it is not reached again."""
    arrivals = sorted(times)
    first = bisect.bisect_left(arrivals, begin)
    before = first - bisect.bisect_left(arrivals, since)
    if begin <= since or not before:
        return None
    usual = before / (begin - since)
    for i in range(first, len(arrivals)):
        if bisect.bisect_left(arrivals, arrivals[i] + window) - i >= share * usual * window:
            back = arrivals[i] - begin
            return back, max(0.0, usual * back - (i - first))
    return None
