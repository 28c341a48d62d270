"""How many (layer, expert) pairs the loss of some ranks, hosts or racks takes the last copy of, at most.

A pair is lost with a set of units (ranks, hosts or racks) when all units with a copy of it are in the set. One unit,
or two, are counted exactly. For more, a bound: spread each pair with copies on c <= k units evenly over these, 1/c on
each. A set of k units that loses the pair contains all c of them, so it collects the whole of it; the pairs that a set
loses are therefore at most the sum of its units' shares, and at most the sum of the k largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from planner.plan.plan import Plan


class LostCopies:
    """The pairs lost with sets of `count` of the `units`, each a collection of ranks of the plans, disjoint. The pairs
    of each plan count for themselves."""

    def __init__(self, plans: Sequence[Plan], units: Sequence[Sequence[int]], count: int) -> None:
        self.units, self.count = len(units), count
        unit_of = {rank: at for at, unit in enumerate(units) for rank in unit}
        before, found = 0, []
        for plan in plans:
            owner = np.array([unit_of.get(rank, self.units) for rank in plan.expert_rank_ids], np.int64)
            table = plan.slots_by_rank().astype(np.int64)
            layers = np.arange(len(table))[:, None, None]
            codes = (before + layers * plan.experts + table) * (self.units + 1) + owner[None, :, None]
            found.append(codes[table >= 0])
            before += len(table) * plan.experts
        keys = np.unique(np.concatenate(found))
        pair, unit = keys // (self.units + 1), keys % (self.units + 1)
        _, first, holders = np.unique(pair, return_index=True, return_counts=True)
        spread = np.repeat(holders, holders)
        inside = unit < self.units
        self.alone = np.bincount(unit[(spread == 1) & inside], minlength=self.units).astype(float)
        chosen = inside & (spread <= count)
        self.shares = np.bincount(unit[chosen], weights=1 / spread[chosen], minlength=self.units)
        at = first[holders == 2]
        a, b = unit[at], unit[at + 1]  # units of a pair ascend
        both = b < self.units
        codes, self._together = np.unique(a[both] * self.units + b[both], return_counts=True)
        self._left, self._right = codes // self.units, codes % self.units

    def most(self) -> int:
        """The most pairs whose last copy a set of `count` units can take: exact for one unit or two, else a bound."""
        if self.count > self.units:
            return 0
        if self.count == 2:
            alone = float(np.sort(self.alone)[-2:].sum())
            sums = self.alone[self._left] + self.alone[self._right] + self._together
            return int(max(alone, sums.max(initial=0.0)))
        values = self.alone if self.count == 1 else self.shares
        return int(np.sort(values)[-self.count :].sum() + 1e-6)

    def sets_above(self, lost: int) -> Iterator[tuple[int, ...]]:
        """All sets of `count` units that may take the last copy of more than `lost` pairs, each once."""
        if self.count == 2:
            yield from self._pairs_above(lost)
            return
        values = self.alone if self.count == 1 else self.shares
        order = np.argsort(-values, kind="stable")
        yield from _above(order.tolist(), values[order].tolist(), self.count, lost + 1 - 1e-6)

    def _pairs_above(self, lost: int) -> Iterator[tuple[int, int]]:
        sums = self.alone[self._left] + self.alone[self._right] + self._together
        seen = set(zip(self._left.tolist(), self._right.tolist(), strict=True))
        found = np.flatnonzero(sums > lost)
        yield from zip(self._left[found].tolist(), self._right[found].tolist(), strict=True)
        order = np.argsort(-self.alone, kind="stable")
        for a, b in _above(order.tolist(), self.alone[order].tolist(), 2, lost + 1 - 1e-6):
            if (min(a, b), max(a, b)) not in seen:
                yield min(a, b), max(a, b)


def _above(order: Sequence[int], values: Sequence[float], count: int, least: float) -> Iterator[tuple[int, ...]]:
    """All sets of `count` of `order` whose values, in descending order, sum to at least `least`."""
    if count > len(order):
        return

    def grow(start: int, chosen: tuple[int, ...], total: float) -> Iterator[tuple[int, ...]]:
        missing = count - len(chosen)
        if not missing:
            yield chosen
            return
        for at in range(start, len(order) - missing + 1):
            if total + missing * values[at] < least:  # no later one has more
                return
            yield from grow(at + 1, (*chosen, order[at]), total + values[at])

    yield from grow(0, (), 0.0)
