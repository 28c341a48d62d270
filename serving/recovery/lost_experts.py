"""What to do about experts that no rank holds any more: wait for them, or mask them and heal beside the steps. Pure.

A plan in force may be part of a goal: some slots are empty because their experts are not loaded yet. Tokens go to the
copies that are there; an expert without one is masked, and the router takes the next best.
"""

import dataclasses
import math
from collections.abc import Collection

import numpy as np

from planner.plan import Plan, as_tuples

POLICIES = ("auto", "wait", "mask")

Slot = tuple[int, int, int]
"""(rank, MoE layer, slot on the rank)."""


def without(plan: Plan, slots: Collection[Slot]) -> Plan:
    """The plan with these slots empty, and experts masked that have no other."""
    if not slots:
        return plan
    table = _by_rank(plan)
    for rank, layer, slot in slots:
        table[layer, plan.holder_ids.index(rank), slot] = -1
    return _with_table(plan, table)


def at_once(goal: Plan, held: Plan) -> Plan:
    """As much of `goal` as its ranks hold already under `held`: it can serve before a single expert is read."""
    if goal.slots_per_rank != held.slots_per_rank:
        return goal
    table, before = _by_rank(goal), _by_rank(held)
    for at, rank in enumerate(goal.holder_ids):
        here = before[:, held.holder_ids.index(rank)] if rank in held.holder_ids else -1
        table[:, at] = np.where(table[:, at] == here, table[:, at], -1)
    return _with_table(goal, table)


def next_part(
    now: Plan,
    goal: Plan,
    most: int,
    *,
    but: Collection[tuple[int, int]] = (),
    only: Collection[tuple[int, int]] | None = None,
) -> Plan:
    """The plan `now` with up to `most` more slots on each rank as `goal` has them, masked experts first.

    Experts in `but`, (MoE layer, expert), are left out: they cannot be read. With `only` all others are.
    """
    table, wanted = _by_rank(now), _by_rank(goal)
    masked = np.zeros((goal.moe_layers, goal.experts), bool)
    for layer, expert in now.masked:
        masked[layer, expert] = True
    unreadable = set(but)
    for at in range(table.shape[1]):
        missing = [(int(layer), int(slot)) for layer, slot in np.argwhere(table[:, at] != wanted[:, at])]
        missing = [(layer, s) for layer, s in missing if (layer, int(wanted[layer, at, s])) not in unreadable]
        if only is not None:
            missing = [(layer, s) for layer, s in missing if (layer, int(wanted[layer, at, s])) in only]
        missing.sort(key=lambda place: (not masked[place[0], wanted[place[0], at, place[1]]], place))
        for layer, slot in missing[:most]:
            table[layer, at, slot] = wanted[layer, at, slot]
    return _with_table(goal, table)


def lost_share(plan: Plan, loads: np.ndarray) -> float:
    """The share of the measured expert traffic that a plan's masked experts had; even traffic when none was seen.

    `loads` is `[moe layers, experts]`.
    """
    if not plan.masked:
        return 0.0
    loads = loads if loads.sum() > 0 else np.ones_like(loads)
    return float(sum(loads[layer, expert] for layer, expert in plan.masked) / loads.sum())


def may_serve(plan: Plan, policy: str, loads: np.ndarray, bound: float) -> bool:
    """Whether to serve with what a plan has now, its masked experts loaded beside the steps."""
    return not plan.masked or policy == "mask" or (policy == "auto" and lost_share(plan, loads) < bound)


def hottest(plan: Plan, rank: int, loads: np.ndarray) -> tuple[int, int]:
    """The (MoE layer, slot) of a rank with the most traffic: what is spoilt to be noticed. Each rank that sends tokens
    sends them to one copy of an expert; some copies have none."""
    slots, routes = plan.slots_of(rank), plan.expert_to_slot()
    layers, first = np.arange(len(slots))[:, None], plan.holder_ids.index(rank) * plan.slots_per_rank
    here = first + np.arange(plan.slots_per_rank)
    senders = (routes[:, layers, np.maximum(slots, 0)] == here).sum(0)
    traffic = np.where(slots >= 0, loads[layers, np.maximum(slots, 0)] * senders, -1)
    layer, slot = np.unravel_index(int(traffic.argmax()), traffic.shape)
    return int(layer), int(slot)


def _by_rank(plan: Plan) -> np.ndarray:
    """int32 [moe layers, ranks, slots]."""
    return plan.slot_table().reshape(plan.moe_layers, len(plan.holders), plan.slots_per_rank)


def _with_table(plan: Plan, table: np.ndarray) -> Plan:
    plan = dataclasses.replace(plan, slots=as_tuples(table.reshape(len(table), math.prod(table.shape[1:]))), masked=())
    masked = tuple((int(layer), int(expert)) for layer, expert in np.argwhere(plan.copies() == 0))
    return dataclasses.replace(plan, masked=masked)
