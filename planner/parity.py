"""Parity groups: one slot of memory that protects several experts which have only one copy.

The slot holds the XOR of its members' weights. Members and the slot are on different hosts (on different
ranks where there are too few hosts), so one loss takes at most one of them and the rest can rebuild it.
"""

from __future__ import annotations

import numpy as np

from planner.copies import copy_counts

FULL = 0.9  # part of the room in groups that is planned with; members get in each other's way


def parity_slots(loads: np.ndarray, slots: int, ranks: int, members: int) -> int:
    """The fewest parity slots per layer for groups of `members`, so that every sole copy is in a group."""
    experts = loads.shape[1]
    for count in range(slots - experts + 1):
        copies = copy_counts(loads, slots - count, ranks, protect=False)
        if (copies == 1).sum(axis=1).max() <= FULL * members * count:
            return count
    return 0


def form_groups(
    table: np.ndarray, experts: int, domain: np.ndarray, members: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """(layer, physical slot, members) for each parity slot, those numbered from `experts` up in `table`.

    Sole copies go, from the fault domain with the most of them, to the emptiest groups that have nothing
    in that domain yet; an expert that finds none stays unprotected.
    """
    groups = []
    for layer, rows in enumerate(table):
        flat = rows.ravel()
        where = np.repeat(domain, rows.shape[1])
        parity = np.flatnonzero(flat >= experts)
        counts = np.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
        sole = np.flatnonzero((flat >= 0) & (flat < experts) & (counts[np.clip(flat, 0, experts - 1)] == 1))
        chosen: list[list[int]] = [[] for _ in parity]
        used = [{int(where[slot])} for slot in parity]
        weight = np.bincount(where[sole], minlength=int(domain.max()) + 1)
        for slot in sole[np.argsort(-weight[where[sole]], kind="stable")]:
            here = int(where[slot])
            free = [g for g in range(len(parity)) if here not in used[g] and len(chosen[g]) < members]
            if free:
                best = min(free, key=lambda g: (len(chosen[g]), g))
                chosen[best].append(int(flat[slot]))
                used[best].add(here)
        groups += [(layer, int(s), tuple(sorted(m))) for s, m in zip(parity, chosen, strict=True) if m]
    return groups
