"""Backfill: lost experts go to the slots of survivors, and no other expert moves.

Tables are int32 [layers, ranks, slots], -1 for an empty slot and numbers from `experts` up for parity slots, which are
given up only after all spare copies; `loads` is float [layers, experts].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from planner.plan.plan import ParityGroup, Plan, PlannedRank
from planner.solver.balance import host_index

FAR = 1e9  # larger than any load, for choices that must come before those by load


def inherit_placement(
    previous: Plan, expert_ranks: Sequence[PlannedRank], slots: int, loads: np.ndarray
) -> tuple[np.ndarray, tuple[ParityGroup, ...]]:
    """The previous placement on `expert_ranks`, with lost experts backfilled and new ranks filled with copies.

    Returns the slot table, int32 [layers, ranks, slots], and the parity groups that are left.
    """
    layers, experts = loads.shape
    held = previous.slots_by_rank()
    for i, group in enumerate(previous.parity):
        held[group.layer].reshape(-1)[group.slot] = experts + i
    where = {rank: at for at, rank in enumerate(previous.expert_rank_ids)}
    old = [at for at, r in enumerate(expert_ranks) if r.id in where]
    shared = min(slots, previous.slots_per_rank)
    table = np.full((layers, len(expert_ranks), slots), -1, np.int32)
    table[:, old, :shared] = held[:, [where[expert_ranks[at].id] for at in old], :shared]
    present = np.zeros((layers, experts + len(previous.parity) + 1), bool)
    present[np.arange(layers)[:, None], table.reshape(layers, -1)] = True
    table = place_lost_experts(table, ~present[:, :experts], loads)
    new = np.ones(len(expert_ranks), bool)
    new[old] = False
    if new.any():
        table = fill_new_ranks(table, new, loads, host_index(expert_ranks))
    groups = [
        replace(previous.parity[table[layer, rank, slot] - experts], slot=int(rank * slots + slot))
        for layer, rank, slot in np.argwhere(table >= experts)
    ]
    return np.where(table >= experts, -1, table), tuple(groups)


def place_lost_experts(table: np.ndarray, missing: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """The table with every missing expert in an empty slot or in place of a spare copy; no other expert moves.

    `missing` is bool [layers, experts]. Each goes to the rank that has to load the fewest experts so far (over all
    layers), then to the one with the least traffic, in place of the copy whose loss adds the least to other ranks.
    """
    table = table.copy()
    taken = np.zeros(table.shape[1], np.int64)
    for layer in np.flatnonzero(missing.any(axis=1)):
        rows = table[layer]
        counts = np.bincount(rows[rows >= 0], minlength=loads.shape[1] + 1)
        lost = np.flatnonzero(missing[layer])
        for expert in lost[np.argsort(-loads[layer, lost], kind="stable")]:
            rank, slot = _spare_slot(rows, counts, taken, loads[layer])
            if rows[rank, slot] >= 0:
                counts[rows[rank, slot]] -= 1
            rows[rank, slot] = expert
            counts[expert] += 1
            taken[rank] += 1
    return table


def _spare_slot(rows: np.ndarray, counts: np.ndarray, taken: np.ndarray, load: np.ndarray) -> tuple[int, int]:
    """The best (rank, slot) to give up: empty, or one of several copies. `rows` is one layer [ranks, slots]."""
    experts = len(load)
    real = (rows >= 0) & (rows < experts)
    index = np.where(real, rows, 0)
    held = np.where(real, (load / np.maximum(counts[:experts], 1))[index], 0.0)
    spare = ~real | (counts[index] > 1)
    scale = held.sum() + 1.0
    after = np.where(real, load[index] / np.maximum(counts[index] - 1, 1), 0.0)
    key = taken[:, None] + (held.sum(axis=1, keepdims=True) + after) / (4 * scale)
    key = np.where(spare, key + FAR * (rows >= experts), np.inf)
    rank, slot = np.unravel_index(int(key.argmin()), rows.shape)
    return int(rank), int(slot)


def fill_new_ranks(table: np.ndarray, new: np.ndarray, loads: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The table with the empty slots of `new` ranks (bool [ranks]) filled with copies; no other expert moves.

    First come experts with a single copy, on another host before on this one; then the expert with the most load per
    copy. `domain` is int [ranks], the host of each rank.
    """
    table = table.copy()
    for layer in range(len(table)):
        rows = table[layer]
        for rank, slot in np.argwhere((rows < 0) & new[:, None]):
            counts = np.bincount(rows[rows >= 0], minlength=loads.shape[1])[: loads.shape[1]]
            key = loads[layer] / np.maximum(counts, 1) + 1e-12 / np.maximum(counts, 1)
            elsewhere = np.zeros(loads.shape[1], bool)
            away = rows[domain != domain[rank]]
            elsewhere[away[(away >= 0) & (away < len(elsewhere))]] = True
            sole = counts == 1
            key = key + FAR * sole * (1 + elsewhere)
            own = rows[rank]
            key[own[(own >= 0) & (own < len(key))]] = -np.inf
            if np.isfinite(key.max()):
                rows[rank, slot] = int(key.argmax())
    return table
