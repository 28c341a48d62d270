"""Losses that leave the same mesh: one of each type stands for all of its type.

The ranks left of a loss (`planner.failures.survivors`), and with them the speed, the messages and the room of what
follows, depend on how many ranks of which role died in which tensor groups, dense groups and hosts, and on the order of
the roles that died, but not on which of several hosts, groups or ranks alike they were. The type of a loss is that
description. A loss of one more unit has a type that depends on the type before and on the type of the unit, so all
types of k units are found by adding each unit to one loss of each type of k - 1 units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from math import inf

from planner.failures.survivors import CapacityModel


class LossTypes:
    """The types of the losses of one plan. Plans with `kinds` in common give hosts alike the same number."""

    def __init__(self, capacity_model: CapacityModel, kinds: dict[Hashable, int] | None = None) -> None:
        self._places = capacity_model.place
        self._dense = capacity_model.dense_group
        hosts: dict[str, list[int]] = {}
        for rank, place in self._places.items():
            hosts.setdefault(place.host, []).append(rank)
        kinds = {} if kinds is None else kinds
        self._kind = {host: kinds.setdefault(self._inside(ranks), len(kinds)) for host, ranks in hosts.items()}
        spread: dict[int, set[int]] = {}
        for rank, place in self._places.items():
            if place.group >= 0:
                spread.setdefault(place.group, set()).add(self._dense.get(rank, -1))
        self.exact = all(len(dense) == 1 for dense in spread.values())

    def of(self, dead: Collection[int]) -> Hashable:
        """The type of a loss; where `exact` is False, losses of one type may leave different meshes."""
        hosts: dict[str, list[int]] = {}
        for rank in dead:
            hosts.setdefault(self._places[rank].host, []).append(rank)
        inside = Counter((self._kind[host], self._inside(ranks)) for host, ranks in hosts.items())
        roles = tuple(self._places[rank].role for rank in sorted(dead))
        return (roles if len(set(roles)) > 1 else (roles[:1], len(roles)), frozenset(inside.items()))

    def _inside(self, ranks: Collection[int]) -> Hashable:
        """The ranks of one host by dense group, tensor group and role, whichever groups of the host they are in."""
        groups: dict[tuple[int, int], Counter[str]] = {}
        for rank in ranks:
            place = self._places[rank]
            groups.setdefault((self._dense.get(rank, -1), place.group), Counter())[place.role] += 1
        dense: dict[int, Counter[Hashable]] = {}
        for (wide, _), roles in groups.items():
            dense.setdefault(wide, Counter())[frozenset(roles.items())] += 1
        return frozenset(Counter(frozenset(each.items()) for each in dense.values()).items())


def examples(
    units: Sequence[Sequence[int]], count: int, type_of: Callable[[Collection[int]], Hashable], most: float = inf
) -> list[tuple[int, ...]] | None:
    """One set of `count` units, as positions in `units`, of each type (`type_of`) that such sets have; None where there
    are more than `most` types."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(count):
        grown: dict[Hashable, tuple[int, ...]] = {}
        for chosen in found:
            dead = [rank for at in chosen for rank in units[at]]
            for at in range(len(units)):
                if at not in chosen:
                    grown.setdefault(type_of((*dead, *units[at])), (*chosen, at))
        found = list(grown.values())
        if len(found) > most:
            return None
    return found
