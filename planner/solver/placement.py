"""Experts to slots: on which rank each copy sits.

All functions work on every layer at once. `loads` is float [layers, experts], the share of traffic each
expert takes; `domain` is int [ranks], the index of the host each rank is on; tables are int32
[layers, ranks, slots], -1 for an empty slot.
"""

from __future__ import annotations

import numpy as np

from planner.balance import slot_loads
from planner.copies import copy_counts

FAR = 1e9  # larger than any sum of loads: orders what must not be before what is merely slow
PACKED = 5e7  # layers x ranks x copies up to which every copy is packed, not dealt


def place(
    loads: np.ndarray,
    domain: np.ndarray,
    slots: int,
    *,
    protect: bool = True,
    parity: int = 0,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """A fresh slot table: copies on different ranks and on two hosts at least, then the load even.

    `protect` gives every expert a second copy when the slots suffice; `parity` is the number of parity
    slots per layer, numbered from `experts` up in the table. `order` are factors near 1 on the loads by which
    copies are counted and sorted, to try something else, float [layers, experts].

    Items (copies, heaviest first) go to the rank with the least load that has a slot left and no copy of the
    same expert, on a host with no more than its part of them. On the largest clusters they are dealt out
    instead, which takes less time and balances a little less well.
    """
    layers, experts = loads.shape
    ranks = len(domain)
    wanted = loads if order is None or parity else loads * order
    counts = copy_counts(wanted, ranks * slots - parity, ranks, protect=protect)
    if parity:
        counts = np.concatenate([counts, np.ones((layers, parity), np.int64)], axis=1)
        loads = np.concatenate([loads, np.zeros((layers, parity))], axis=1)
        experts += parity
    item, weight = _items(counts, loads, order)
    if layers * ranks * item.shape[1] <= PACKED:
        at = _pack(item, weight, np.full((layers, ranks), slots), experts, domain)
    else:
        at = _deal(item, domain, slots)
    table = _fill(item, at, ranks, slots)
    return separate(table, slot_loads(table, loads), domain)


def _items(counts: np.ndarray, loads: np.ndarray, order: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Every copy as an item, heaviest first: expert and load, both [layers, items]; -1 pads."""
    layers = len(counts)
    width = int(counts.sum(axis=1).max())
    item = np.full((layers, width), -1, np.int64)
    weight = np.zeros((layers, width))
    each = loads / np.maximum(counts, 1)
    sort = each.copy()
    if order is not None:
        sort[:, : order.shape[1]] *= order
    for layer in range(layers):
        by_weight = np.argsort(-sort[layer], kind="stable")
        row = np.repeat(by_weight, counts[layer, by_weight])
        item[layer, : len(row)] = row
        weight[layer, : len(row)] = each[layer, row]
    return item, weight


def _pack(item: np.ndarray, weight: np.ndarray, room: np.ndarray, experts: int, domain: np.ndarray) -> np.ndarray:
    """Rank of each item, int [layers, items], -1 for pads; `room` is the slots of each rank [layers, ranks].

    Copies of an expert go to different ranks and evenly to the domains where there is room.
    """
    layers, ranks = room.shape
    at = np.full(item.shape, -1, np.int64)
    load = np.zeros((layers, ranks))
    left = room.astype(np.int64).copy()
    held = np.zeros((layers, experts, ranks), np.int8)
    hosts = int(domain.max()) + 1
    hosted = np.zeros((layers, experts, hosts), np.int16)
    rows = np.arange(layers)
    copies = np.zeros((layers, experts), np.int64)
    np.add.at(copies, (rows[:, None], item), item >= 0)
    quota = -(-copies // hosts)
    turn = (np.arange(ranks)[None, :] + rows[:, None] * 7) % ranks * 1e-9
    for i in range(item.shape[1]):
        expert = item[:, i]
        key = load + turn - 1e-7 * left + FAR * (left <= 0) * 1e3 + FAR * held[rows, expert]
        key += FAR / 100 * (hosted[rows, expert][:, domain] >= quota[rows, expert][:, None])
        best = key.argmin(axis=1)
        live = expert >= 0
        at[:, i] = np.where(live, best, -1)
        load[rows, best] += np.where(live, weight[:, i], 0.0)
        left[rows, best] -= live
        held[rows[live], expert[live], best[live]] += 1
        hosted[rows[live], expert[live], domain[best[live]]] += 1
    return at


def _deal(item: np.ndarray, domain: np.ndarray, slots: int) -> np.ndarray:
    """As `_pack`, for the largest clusters: dealt in rounds, to and fro, neighbours on different hosts."""
    ranks = len(domain)
    seat = np.zeros(ranks, np.int64)
    for host in range(int(domain.max()) + 1):
        members = np.flatnonzero(domain == host)
        seat[members] = np.arange(len(members))
    order = np.lexsort((domain, seat))
    turns = np.concatenate([order if i % 2 == 0 else order[::-1] for i in range(slots)])
    return np.where(item >= 0, turns[None, : item.shape[1]], -1)


def _fill(item: np.ndarray, at: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Items on the ranks `at`, both [layers, items], as a table [layers, ranks, slots]."""
    layers = len(item)
    table = np.full((layers * ranks, slots), -1, np.int32)
    row, column = np.nonzero(at >= 0)
    seat = row * ranks + at[row, column]
    order = np.argsort(seat, kind="stable")
    nth = np.arange(len(order)) - np.searchsorted(seat[order], seat[order])
    table[seat[order], nth] = item[row, column][order]
    return table.reshape(layers, ranks, slots)


def separate(table: np.ndarray, weight: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The table with no expert twice on a rank, nor all its copies on one host, where a swap can avoid it.

    `weight` is the load of each slot, float [layers, ranks, slots]; swaps are between slots of like load.
    """
    table, weight = table.copy(), weight.copy()
    ordered = np.sort(table, axis=2)
    double = ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(axis=2)
    for layer, rank in np.argwhere(double):
        for slot in range(table.shape[2]):
            if table[layer, rank, slot] in table[layer, rank, :slot]:
                _swap_out(table[layer], weight[layer], domain, int(rank), slot)
    if domain.max() > 0:
        for layer, rows in enumerate(table):
            for expert in _sharing_a_host(rows, domain):
                for rank, slot in np.argwhere(rows == expert):
                    if _swap_out(rows, weight[layer], domain, int(rank), int(slot), other_host=True):
                        break
    return table


def _sharing_a_host(rows: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Experts of one layer [ranks, slots] that have several copies, all on one host."""
    flat, host = rows.ravel(), np.repeat(domain, rows.shape[1])
    held = np.flatnonzero(flat >= 0)
    size = int(flat.max(initial=0)) + 1
    low, high = np.full(size, np.iinfo(np.int64).max), np.full(size, -1)
    np.minimum.at(low, flat[held], host[held])
    np.maximum.at(high, flat[held], host[held])
    return np.flatnonzero((low == high) & (np.bincount(flat[held], minlength=size) > 1))


def _swap_out(
    rows: np.ndarray,
    weight: np.ndarray,
    domain: np.ndarray,
    rank: int,
    slot: int,
    *,
    other_host: bool = False,
) -> bool:
    """Swap a slot of one layer [ranks, slots] with the slot of nearest weight on a rank without its expert.

    With `other_host` that rank is on another host, and what comes back stays on two hosts if it is on two.
    False when there is no such slot.
    """
    expert = rows[rank, slot]
    free = ~(rows == expert).any(axis=1)
    clash = np.isin(rows, rows[rank])
    if other_host:
        free &= domain != domain[rank]
        size = int(rows.max()) + 2
        on_host = np.zeros((size, int(domain.max()) + 1), np.int64)
        np.add.at(on_host, (rows, domain[:, None]), 1)
        here = on_host[rows, domain[rank]] > 0
        clash |= here & (on_host[rows, domain[:, None]] < 2)
    fits = free[:, None] & ((rows < 0) | ~clash)
    if not fits.any():
        return False
    away = np.where(fits, np.abs(weight - weight[rank, slot]), np.inf)
    other = np.unravel_index(int(away.argmin()), rows.shape)
    for array in (rows, weight):
        array[rank, slot], array[other] = array[other], array[rank, slot]
    return True
