"""The order in which experts move to other slots while steps go on: each part of the way is safe by itself. Pure.

Between two parts every expert has as many copies, on as many hosts, as it has in the plan before or in the plan
after, whichever is fewer: a loss at any moment costs no more than before or after the move.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from planner.plan.plan import Plan, as_tuples
from planner.solver.balance import host_index

Change = tuple[int, int]
"""(expert rank's index, slot), of one layer."""


def next_moves(
    in_force: Plan, desired: Plan, max_slots: int, *, excluding: Collection[tuple[int, int]] = ()
) -> Plan | None:
    """The plan `in_force` with more slots as in `desired`, which has the same ranks: up to `max_slots` of each rank, or
    more where only more are safe together. Experts in `excluding`, (MoE layer, expert), do not move. None when no move
    is left."""
    if in_force.rank_ids != desired.rank_ids or in_force.slots_per_rank != desired.slots_per_rank:
        return None
    table, wanted, hosts = in_force.slots_by_rank(), desired.slots_by_rank(), host_index(desired.expert_ranks)
    moved, stays = np.zeros(table.shape[1], int), set(excluding)
    for layer in range(len(table)):
        if moved.min() >= max_slots:
            break
        for start in _changes(table[layer], wanted[layer]):
            if table[layer][start] == wanted[layer][start]:  # it was made with an earlier one
                continue
            if moved.any() and moved[start[0]] >= max_slots:
                continue
            group = _group(start, table[layer], wanted[layer], hosts)
            after = moved + np.bincount([rank for rank, _ in group], minlength=len(moved))
            barred = any((layer, int(wanted[layer][at])) in stays for at in group)
            if barred or (moved.any() and after.max() > max_slots):
                continue
            _make(group, table[layer], wanted[layer])
            moved = after
    return dataclasses.replace(in_force, slots=as_tuples(table.reshape(len(table), -1))) if moved.any() else None


def _changes(before: np.ndarray, after: np.ndarray) -> list[Change]:
    """The slots in which two tables of a layer, int `[ranks, slots]`, differ; slots that become empty are left out."""
    return [(int(rank), int(slot)) for rank, slot in np.argwhere((before != after) & (after >= 0))]


def _group(start: Change, before: np.ndarray, after: np.ndarray, hosts: np.ndarray) -> list[Change]:
    """A change and the changes that must be made with it: then no expert has fewer copies, or copies on fewer hosts,
    than in the one of the two tables that has fewer."""
    group, left, table = [start], [at for at in _changes(before, after) if at != start], before.copy()
    while True:
        _make(group, table, after)
        lost = {int(before[at]) for at in group} - {-1}
        short = {expert for expert in lost if _is_short(expert, before, after, table, hosts)}
        gains = [at for at in left if int(after[at]) in short]
        if not gains:
            return group
        group += gains
        left = [at for at in left if at not in gains]


def _make(changes: list[Change], table: np.ndarray, after: np.ndarray) -> None:
    for at in changes:
        table[at] = after[at]


def _is_short(expert: int, before: np.ndarray, after: np.ndarray, table: np.ndarray, hosts: np.ndarray) -> bool:
    (copies, on), (copies_before, on_before), (copies_after, on_after) = (
        (int((each == expert).sum()), len(np.unique(hosts[(each == expert).any(axis=1)])))
        for each in (table, before, after)
    )
    return copies < min(copies_before, copies_after) or on < min(on_before, on_after)
