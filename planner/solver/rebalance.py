"""Rebalancing: a placement is moved towards measured loads, a few experts at a time, and stays fault tolerant."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.errors import InputError
from planner.plan.plan import Plan, as_tuples
from planner.solver.balance import balance_by_swaps, host_index, peak_over_mean, rank_loads

MODES = ("global", "hierarchical")


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """The new plan, and the highest load of a rank over the mean, before and after: float [moe_layers]."""

    plan: Plan
    before: np.ndarray
    after: np.ndarray
    moved: int


def rebalance(
    plan: Plan,
    loads: np.ndarray,
    *,
    mode: str = "global",
    moves_per_layer: int = 64,
    copies: int = 2,
    speed: np.ndarray | None = None,
) -> Rebalance:
    """`plan` with experts recopied and swapped towards `loads`, float [moe_layers, experts].

    An expert with `copies` copies, or with copies on two hosts, still has them afterwards. The mode "hierarchical"
    swaps within hosts only, so that no expert crosses the network. On each layer at most `moves_per_layer` slots go to
    other experts and as many are swapped (on each host, when hierarchical). Parity slots stay; a plan that has any gets
    no swaps. Loads of ranks are over their `speed`, float [expert ranks] with a mean of 1, where it is given.
    InputError for a dense model, an unknown mode, or loads of another shape.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if not plan.experts:
        raise InputError("the plan is of a dense model: it has no experts to rebalance")
    if loads.shape != (plan.moe_layers, plan.experts):
        raise InputError(f"loads have shape {loads.shape}; the plan has {(plan.moe_layers, plan.experts)}")
    table = plan.slots_by_rank()
    reserved = {(g.layer, g.slot) for g in plan.parity}
    for layer, slot in reserved:
        table[layer].reshape(-1)[slot] = plan.experts
    domain = host_index(plan.expert_ranks)
    pace = np.ones(len(domain)) if speed is None else speed
    start = table.copy()
    for layer in range(len(table)):
        _recopy(table[layer], loads[layer], domain, moves_per_layer, copies, pace, inside=mode == "hierarchical")
    if not reserved:
        swap = balance_by_swaps if mode == "global" else _swap_inside
        table = swap(table, loads, domain, rounds=moves_per_layer // 2, speed=pace)
    before = peak_over_mean(start, loads, pace)
    better = peak_over_mean(table, loads, pace) < before
    table = np.where(better[:, None, None], table, start)
    slots = np.where(table >= plan.experts, -1, table).reshape(plan.moe_layers, -1)
    return Rebalance(
        plan=replace(plan, slots=as_tuples(slots), epoch=plan.epoch + 1),
        before=before,
        after=peak_over_mean(table, loads, pace),
        moved=int((table != start).sum()),
    )


def _swap_inside(
    table: np.ndarray, loads: np.ndarray, domain: np.ndarray, *, rounds: int, speed: np.ndarray
) -> np.ndarray:
    """The table after swaps between ranks of the same host only."""
    table = table.copy()
    for host in range(int(domain.max()) + 1):
        ranks = np.flatnonzero(domain == host)
        table[:, ranks] = _with_counts(table, loads, ranks, rounds, speed[ranks] / speed[ranks].mean())
    return table


def _with_counts(table: np.ndarray, loads: np.ndarray, ranks: np.ndarray, rounds: int, speed: np.ndarray) -> np.ndarray:
    """`balance_by_swaps` on some ranks, with each copy's load taken from the whole table."""
    layers, experts = loads.shape
    flat = np.where((table < 0) | (table >= experts), experts, table).reshape(layers, -1)
    whole, part = np.zeros((layers, experts + 1)), np.zeros((layers, experts + 1))
    row = np.arange(layers)[:, None]
    np.add.at(whole, (row, flat), 1)
    np.add.at(part, (row, flat.reshape(table.shape)[:, ranks].reshape(layers, -1)), 1)
    scaled = loads * part[:, :-1] / np.maximum(whole[:, :-1], 1)
    return balance_by_swaps(table[:, ranks], scaled, np.zeros(len(ranks), np.int64), rounds=rounds, speed=speed)


def _recopy(
    rows: np.ndarray,
    load: np.ndarray,
    domain: np.ndarray,
    most: int,
    keep: int,
    speed: np.ndarray,
    *,
    inside: bool,
) -> None:
    """Give slots of experts with little load to the busiest expert of the rank with the highest load over its `speed`,
    while that helps.

    `rows` is one layer [ranks, slots], changed in place; `inside` stays on hosts that hold the expert.
    """
    experts = len(load)
    for _ in range(most):
        by_rank = rank_loads(rows[None], load[None])[0]
        counts = np.bincount(rows[rows >= 0], minlength=experts + 1)[:experts]
        hot = int((by_rank / speed).argmax())
        mine = rows[hot][(rows[hot] >= 0) & (rows[hot] < experts)]
        if not len(mine):
            return
        expert = int(mine[(load[mine] / counts[mine]).argmax()])
        best = _victim(rows, load, counts, domain, expert, by_rank, keep, speed, inside=inside)
        if best is None:
            return
        rows[best] = expert


def _victim(
    rows: np.ndarray,
    load: np.ndarray,
    counts: np.ndarray,
    domain: np.ndarray,
    expert: int,
    by_rank: np.ndarray,
    keep: int,
    speed: np.ndarray,
    *,
    inside: bool,
) -> tuple[int, int] | None:
    """The best slot to give up for one more copy of `expert`: an empty one, or one of more than `keep` copies.

    None when every choice would leave the highest load of a rank, over its `speed`, as it is.
    """
    experts = len(load)
    real = (rows >= 0) & (rows < experts)
    index = np.where(real, rows, 0)
    host = np.broadcast_to(domain[:, None], rows.shape)
    hosts = np.zeros((experts, int(domain.max()) + 1), np.int64)
    np.add.at(hosts, (index[real], host[real]), 1)
    alone = hosts[index, host] == 1
    allowed = (rows == -1) | (real & (counts[index] > keep) & ~(alone & ((hosts > 0).sum(axis=1)[index] <= 2)))
    allowed &= ~(rows == expert).any(axis=1)[:, None]
    if inside:
        allowed &= (hosts[expert][domain] > 0)[:, None]
    hottest = np.zeros(experts)
    relief = load[expert] / counts[expert] - load[expert] / (counts[expert] + 1)
    relieved = by_rank - np.where((rows == expert).any(axis=1), relief, 0.0)
    each = load / np.maximum(counts, 1)
    heavier = load / np.maximum(counts - 1, 1) - each
    np.maximum.at(hottest, index[real], ((relieved[:, None] + heavier[index]) / speed[:, None])[real])
    target = by_rank[:, None] + load[expert] / (counts[expert] + 1) - np.where(real, each[index], 0)
    after = np.maximum(target / speed[:, None], np.where(real, hottest[index], 0))
    after = np.where(allowed, after, np.inf)
    rank, slot = np.unravel_index(int(after.argmin()), rows.shape)
    return (int(rank), int(slot)) if after[rank, slot] < (by_rank / speed).max() * (1 - 1e-9) else None
