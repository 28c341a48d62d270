"""Losses by hand: all unions of units that are lost together."""

from collections.abc import Sequence
from itertools import combinations


def unions(units: Sequence[tuple[int, ...]], most: int) -> set[tuple[int, ...]]:
    """The sorted ranks of each union of one unit to `most` of them."""
    counts = range(1, min(most, len(units)) + 1)
    return {tuple(sorted(sum(chosen, ()))) for count in counts for chosen in combinations(units, count)}
