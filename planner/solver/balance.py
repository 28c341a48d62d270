"""The balance of expert traffic over ranks, and swaps between ranks that lower the highest load.

Tables are int32 [layers, ranks, slots], -1 for an empty slot and numbers from `experts` up for parity
slots, which take no traffic; `loads` is float [layers, experts]; `domain` is int [ranks], the host of each
rank. An expert's traffic is split evenly over its copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.plan.plan import Plan, PlannedRank

NEAR = 1.00001  # peak over mean at which a layer is balanced enough
FIRST = 48  # best swaps of a layer that are checked first
PARTNERS = 320  # slots of the coolest ranks that are tried as partners of one of the hottest


def host_index(ranks: Sequence[PlannedRank]) -> np.ndarray:
    """Index of the host of each rank, int [ranks]; hosts are numbered as they appear."""
    hosts = {h: i for i, h in enumerate(dict.fromkeys(r.host for r in ranks))}
    return np.array([hosts[r.host] for r in ranks], np.int64)


def slot_loads(table: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Traffic of each slot, float [layers, ranks, slots]."""
    layers, experts = loads.shape
    flat = np.where((table < 0) | (table >= experts), experts, table).reshape(layers, table.shape[1] * table.shape[2])
    row = np.arange(layers)[:, None]
    index = (row * (experts + 1) + flat).ravel()
    counts = np.bincount(index, minlength=layers * (experts + 1)).reshape(layers, experts + 1)
    each = np.zeros((layers, experts + 1))
    each[:, :experts] = loads / np.maximum(counts[:, :experts], 1)
    return each[row, flat].reshape(table.shape)


def rank_loads(table: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Traffic of each rank, float [layers, ranks]."""
    return slot_loads(table, loads).sum(axis=2)


def peak_over_mean(table: np.ndarray, loads: np.ndarray, speed: np.ndarray | None = None) -> np.ndarray:
    """The highest load of a rank over the mean, float [layers]; 1 is perfect balance. Loads are over the `speed` of
    their rank, float [ranks] with a mean of 1, where it is given."""
    by_rank = rank_loads(table, loads)
    top = by_rank if speed is None else by_rank / speed
    return top.max(axis=1) / np.maximum(by_rank.mean(axis=1), 1e-300)


def peak_load(plan: Plan, loads: np.ndarray, speed: np.ndarray | None = None) -> np.ndarray:
    """Load of the hottest rank of a plan over the mean, float [moe_layers], as `peak_over_mean` has it."""
    return peak_over_mean(plan.slots_by_rank(), loads, speed)


def relative_rank_loads(plan: Plan, shares: np.ndarray) -> np.ndarray:
    """Traffic of each expert rank of a plan, where 1 is its even share: float [moe_layers, expert ranks].

    `shares` are the experts' shares of their layer's traffic, float [moe_layers, experts].
    """
    return rank_loads(plan.slots_by_rank(), shares) * len(plan.expert_ranks)


def balance_by_swaps(
    table: np.ndarray,
    loads: np.ndarray,
    domain: np.ndarray,
    *,
    rounds: int | None = None,
    speed: np.ndarray | None = None,
) -> np.ndarray:
    """The table after swaps that each lower the highest load of a rank (over its `speed`, float [ranks], if given), one
    swap per layer and round.

    A swap never puts an expert twice on a rank and never brings copies that are on two hosts onto one.
    Stops when no swap helps, or after `rounds`.
    """
    table = table.copy()
    layers, ranks = table.shape[:2]
    experts = loads.shape[1]
    if ranks < 2:
        return table
    weight = slot_loads(table, loads)
    on_host = _host_counts(table, domain, max(experts, int(table.max()) + 1))
    span = (on_host > 0).sum(axis=2)
    live = np.arange(layers)
    for _ in range(min(4 * ranks, 300) if rounds is None else rounds):
        if not len(live):
            break
        done = _swap_once(table, weight, on_host, span, domain, live, speed)
        live = live[done]
    return table


def _host_counts(table: np.ndarray, domain: np.ndarray, experts: int) -> np.ndarray:
    """Copies of each expert on each host, int16 [layers, experts + 1, hosts]; the last row counts empty slots."""
    layers, _, slots = table.shape
    counts = np.zeros((layers, experts + 1, int(domain.max()) + 1), np.int16)
    host = np.repeat(domain, slots)[None, :]
    np.add.at(counts, (np.arange(layers)[:, None], table.reshape(layers, -1), host), 1)
    return counts


def _swap_once(
    table: np.ndarray,
    weight: np.ndarray,
    on_host: np.ndarray,
    span: np.ndarray,
    domain: np.ndarray,
    live: np.ndarray,
    speed: np.ndarray | None = None,
) -> np.ndarray:
    """Make the best swap of the rank with the highest load on each of the `live` layers: bool [live], where made.

    Changes its arrays in place. `on_host` [layers, experts + 1, hosts] counts copies, `span` [layers, experts + 1] the
    hosts that have one.
    """
    row = np.arange(len(live))
    by_rank = weight[live].sum(axis=2)
    even = by_rank.mean(axis=1)
    pace = np.ones(by_rank.shape[1]) if speed is None else speed
    by_rank = by_rank / pace
    hot = by_rank.argmax(axis=1)
    partners = min(max(24, PARTNERS // weight.shape[2]), by_rank.shape[1] - 1)
    cool = np.argpartition(by_rank, partners - 1, axis=1)[:, :partners]
    top = by_rank[row, hot]
    gain = weight[live, hot][:, :, None, None] - weight[live[:, None], cool][:, None]
    less = more = gain
    if speed is not None:
        less, more = gain / pace[hot][:, None, None, None], gain / pace[cool][:, None, :, None]
    after = np.maximum(top[:, None, None, None] - less, by_rank[row[:, None], cool][:, None, :, None] + more)
    after = np.where(gain > 1e-15, after, np.inf).reshape(len(live), -1)
    pick = np.empty(len(live), np.int64)
    some, tried = row, min(FIRST, after.shape[1])
    while len(some):  # the best swap is nearly always legal: few are checked, and all only where none of them is
        best = np.sort(np.argpartition(after[some], tried - 1, axis=1)[:, :tried], axis=1)
        mine, partner, theirs = np.unravel_index(best, gain.shape[1:])
        rank = cool[some[:, None], partner]
        legal = _legal(table, on_host, span, domain, (live[some], hot[some], mine), (rank, theirs))
        value = np.where(legal, np.take_along_axis(after[some], best, axis=1), np.inf)
        pick[some] = np.take_along_axis(best, value.argmin(axis=1)[:, None], axis=1)[:, 0]
        after[some, pick[some]] = value.min(axis=1)
        none = ~np.isfinite(value.min(axis=1))
        some, tried = (some[none], after.shape[1]) if tried < after.shape[1] else (some[:0], tried)
    done = after[row, pick] < top * (1 - 1e-9)
    done &= top > NEAR * even
    mine, partner, theirs = np.unravel_index(pick, gain.shape[1:])
    rank = cool[row, partner]
    a, b = (live[done], hot[done], mine[done]), (live[done], rank[done], theirs[done])
    hot_host, cool_host = domain[hot[done]], domain[rank[done]]
    for expert, gone, come in ((table[a], hot_host, cool_host), (table[b], cool_host, hot_host)):
        np.subtract.at(on_host, (live[done], expert, gone), 1)
        np.add.at(on_host, (live[done], expert, come), 1)
        span[live[done], expert] = (on_host[live[done], expert] > 0).sum(axis=1)
    for array in (table, weight):
        array[a], array[b] = array[b], array[a].copy()
    return done


def _legal(
    table: np.ndarray,
    on_host: np.ndarray,
    span: np.ndarray,
    domain: np.ndarray,
    mine: tuple[np.ndarray, np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The swaps that keep copies apart: bool [live, swaps]. `mine` are the layers [live], their hottest ranks [live],
    and slots of these [live, swaps], `theirs` the ranks and slots swapped with, both [live, swaps].

    On the same host only ranks matter; between hosts an expert must stay on two hosts if it is on two.
    """
    (live, hot, slot), (cool, other) = mine, theirs
    layer = live[:, None]
    goes, comes = table[layer, hot[:, None], slot], table[layer, cool, other]
    held = (table[layer, cool] == goes[:, :, None]).any(axis=2)
    holds = (table[live, hot][:, None, :] == comes[:, :, None]).any(axis=2) & (comes >= 0)
    here, there = domain[hot][:, None], domain[cool]

    def fewer(expert: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        change = (on_host[layer, expert, new] == 0).astype(int) - (on_host[layer, expert, old] == 1)
        return (expert >= 0) & (span[layer, expert] + change < np.minimum(span[layer, expert], 2))

    apart = fewer(goes, here, there) | fewer(comes, there, here)
    return ~held & ~holds & ((here == there) | ~apart)
