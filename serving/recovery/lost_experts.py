"""Experts that no rank holds any more: wait until they are loaded, or mask them and load them beside the steps. Pure.

The plan in force may be a part of the desired plan: some slots are empty while their experts are being loaded. Tokens
go to the other copies; an expert without any copy is masked, and the router takes the next best.
"""

import dataclasses
import math
from collections.abc import Collection

import numpy as np

from planner.plan.plan import Plan, as_tuples

Slot = tuple[int, int, int]
"""(rank, MoE layer, slot on the rank)."""


def without_slots(plan: Plan, slots: Collection[Slot]) -> Plan:
    """The plan with these slots empty; experts that have no other slot are masked."""
    if not slots:
        return plan
    table = plan.slots_by_rank()
    for rank, layer, slot in slots:
        table[layer, plan.expert_rank_ids.index(rank), slot] = -1
    return _with_table(plan, table)


def held_part(desired: Plan, held: Plan) -> Plan:
    """The part of `desired` that its ranks hold already under the plan `held`: it can serve before any expert is
    read."""
    if desired.slots_per_rank != held.slots_per_rank:
        return desired
    table, before = desired.slots_by_rank(), held.slots_by_rank()
    for at, rank in enumerate(desired.expert_rank_ids):
        slots_before = before[:, held.expert_rank_ids.index(rank)] if rank in held.expert_rank_ids else -1
        table[:, at] = np.where(table[:, at] == slots_before, table[:, at], -1)
    return _with_table(desired, table)


def next_part(
    in_force: Plan,
    desired: Plan,
    max_slots: int,
    *,
    excluding: Collection[tuple[int, int]] = (),
    only: Collection[tuple[int, int]] | None = None,
) -> Plan:
    """The plan `in_force` with up to `max_slots` more slots of each rank as in `desired`, masked experts first. Experts
    in `excluding`, (MoE layer, expert), are left out; with `only`, all others are."""
    table, wanted = in_force.slots_by_rank(), desired.slots_by_rank()
    masked = np.zeros((desired.moe_layers, desired.experts), bool)
    for layer, expert in in_force.masked:
        masked[layer, expert] = True
    unreadable = set(excluding)
    for at in range(table.shape[1]):
        empty = (table[:, at] < 0) & (wanted[:, at] >= 0)  # what only moves is for `expert_moves`
        missing = [(int(layer), int(slot)) for layer, slot in np.argwhere(empty)]
        missing = [(layer, s) for layer, s in missing if (layer, int(wanted[layer, at, s])) not in unreadable]
        if only is not None:
            missing = [(layer, s) for layer, s in missing if (layer, int(wanted[layer, at, s])) in only]
        missing.sort(key=lambda slot: (not masked[slot[0], wanted[slot[0], at, slot[1]]], slot))
        for layer, slot in missing[:max_slots]:
            table[layer, at, slot] = wanted[layer, at, slot]
    return _with_table(desired, table)


def lost_share(plan: Plan, loads: np.ndarray) -> float:
    """The share of the measured traffic that a plan's masked experts had; of even traffic while none is measured.
    `loads` is `[moe layers, experts]`."""
    if not plan.masked:
        return 0.0
    loads = loads if loads.sum() > 0 else np.ones_like(loads)
    return float(sum(loads[layer, expert] for layer, expert in plan.masked) / loads.sum())


def may_serve(plan: Plan, policy: str, loads: np.ndarray, bound: float) -> bool:
    """Whether a plan with masked experts may serve while they are loaded beside the steps. `bound` is the most of the
    traffic that `auto` masks."""
    return not plan.masked or policy == "mask" or (policy == "auto" and lost_share(plan, loads) < bound)


def _with_table(plan: Plan, table: np.ndarray) -> Plan:
    plan = dataclasses.replace(plan, slots=as_tuples(table.reshape(len(table), math.prod(table.shape[1:]))), masked=())
    masked = tuple((int(layer), int(expert)) for layer, expert in np.argwhere(plan.copies() == 0))
    return dataclasses.replace(plan, masked=masked)
