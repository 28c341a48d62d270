"""Which ranks hold which experts at a time: before any loss, or after some of several."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from planner.plan.plan import Plan
from planner.solver.backfill import place_lost_experts


class HeldExperts:
    """The experts in the slots of ranks: `table` is int32 [moe_layers, ranks, slots], -1 for an empty slot."""

    def __init__(self, ranks: Sequence[int], table: np.ndarray, experts: int) -> None:
        self.ranks, self.table, self.experts = tuple(ranks), table, experts
        self.position = {rank: at for at, rank in enumerate(self.ranks)}

    @classmethod
    def of(cls, plan: Plan) -> HeldExperts:
        """The experts as a plan places them."""
        return cls(plan.expert_rank_ids, plan.slots_by_rank(), plan.experts)

    @cached_property
    def copies(self) -> np.ndarray:
        """The number of copies of each expert, int32 [moe_layers, experts]."""
        layers, ranks, slots = self.table.shape
        counts = np.zeros((layers, self.experts + 1), np.int32)
        flat = self.table.reshape(layers, ranks * slots)
        np.add.at(counts, (np.arange(layers)[:, None], flat), 1)  # an empty slot counts in the last column
        return counts[:, : self.experts]

    def lost(self, dead: Collection[int]) -> tuple[np.ndarray, int]:
        """The pairs whose last copy the ranks `dead` take, bool [moe_layers, experts], and the number of pairs that
        these ranks hold."""
        gone = [self.position[rank] for rank in dead if rank in self.position]
        lost = np.zeros(self.copies.shape, bool)
        if not gone or not lost.size:
            return lost, 0
        layers, _, slots = self.table.shape
        flat = self.table[:, gone].reshape(layers, len(gone) * slots)
        if flat.shape[1] == 1:
            rows = np.flatnonzero(flat[:, 0] >= 0)
            experts = flat[rows, 0]
            lost[rows, experts] = self.copies[rows, experts] == 1
            return lost, len(rows)
        away = np.zeros((layers, self.experts + 1), np.int32)
        np.add.at(away, (np.arange(layers)[:, None], flat), 1)
        away = away[:, :-1]
        return (away > 0) & (away == self.copies), int((away > 0).sum())

    def missing(self, before: HeldExperts) -> np.ndarray:
        """The pairs without a copy here that had one `before`, bool [moe_layers, experts]."""
        return (self.copies == 0) & (before.copies > 0)

    def on(self, ranks: Sequence[int], slots: int) -> HeldExperts:
        """The same experts on `ranks` alone, with `slots` slots each: ranks that hold none yet have empty slots."""
        at = np.array([self.position.get(rank, -1) for rank in ranks], np.int64)
        width = min(slots, self.table.shape[2])
        rows = np.full((len(self.table), len(at), slots), -1, np.int32)
        known = at >= 0
        rows[:, known, :width] = self.table[:, at[known], :width]
        return HeldExperts(ranks, rows, self.experts)

    def returned(self, ranks: Collection[int], placed: HeldExperts) -> HeldExperts:
        """With the experts of `placed` on `ranks`, beside those of the other ranks."""
        back = [rank for rank in sorted(ranks) if rank in placed.position]
        both = self.on([*(rank for rank in self.ranks if rank not in ranks), *back], self.table.shape[2])
        rows = placed.on(back, self.table.shape[2]).table
        both.table[:, [both.position[rank] for rank in back]] = rows
        return both

    def filled(self, missing: np.ndarray, loads: np.ndarray) -> HeldExperts:
        """With the pairs `missing` (bool [moe_layers, experts]) in empty slots or in place of spare copies, as the
        solver places lost experts; `loads` is float [moe_layers, experts]."""
        return HeldExperts(self.ranks, place_lost_experts(self.table, missing, loads), self.experts)

    def loaded_since(self, before: HeldExperts) -> np.ndarray:
        """The experts that each rank loads for it, beside the ones it holds in `before` (of the same ranks and
        slots): int [ranks]."""
        return ((self.table != before.table) & (self.table >= 0)).sum(axis=(0, 2))
