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
FLAT = 5e7  # layers x ranks x copies up to which copies go to ranks directly, not by way of hosts


def place(
    loads: np.ndarray, domain: np.ndarray, slots: int, *, protect: bool = True, parity: int = 0
) -> np.ndarray:
    """A fresh slot table: copies on different ranks and on two hosts at least, then the load even.

    `protect` gives every expert a second copy when the slots suffice; `parity` is the number of parity
    slots per layer, numbered from `experts` up in the table.

    Items (copies, heaviest first) go to the rank with the least load that has a slot left and no copy of the
    same expert, a second copy to another host than the first. On large clusters they go to hosts first and then, inside each
    host, to ranks, which takes less time and balances a little less well.
    """
    layers, experts = loads.shape
    ranks = len(domain)
    counts = copy_counts(loads, ranks * slots - parity, ranks, protect=protect)
    if parity:
        counts = np.concatenate([counts, np.ones((layers, parity), np.int64)], axis=1)
        loads = np.concatenate([loads, np.zeros((layers, parity))], axis=1)
        experts += parity
    item, weight = _items(counts, loads)
    if layers * ranks * item.shape[1] <= FLAT:
        room = np.full((layers, ranks), slots)
        table = _fill(item, _pack(item, weight, room, experts, domain), ranks, slots)
        return separate(table, slot_loads(table, loads), domain)
    size = np.bincount(domain)
    hosts = _pack(item, weight, np.broadcast_to(size * slots, (layers, len(size))), experts)
    table = np.full((layers, ranks, slots), -1, np.int32)
    for width in np.unique(size):
        group = np.flatnonzero(size == width)
        inner, inner_weight = _gather(item, weight, hosts, group, int(width) * slots)
        room = np.full((len(inner), int(width)), slots)
        at = _pack(inner, inner_weight, room, experts)
        filled = _fill(inner, at, int(width), slots).reshape(layers, len(group), int(width), slots)
        for i, host in enumerate(group):
            table[:, domain == host] = filled[:, i]
    return separate(table, slot_loads(table, loads), domain)


def _items(counts: np.ndarray, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every copy as an item, heaviest first: expert and load, both [layers, items]; -1 pads."""
    layers = len(counts)
    width = int(counts.sum(axis=1).max())
    item = np.full((layers, width), -1, np.int64)
    weight = np.zeros((layers, width))
    each = loads / np.maximum(counts, 1)
    for layer in range(layers):
        order = np.argsort(-each[layer], kind="stable")
        order = order[counts[layer, order] > 0]
        row = np.repeat(order, counts[layer, order])
        item[layer, : len(row)] = row
        weight[layer, : len(row)] = each[layer, row]
    return item, weight


def _pack(
    item: np.ndarray, weight: np.ndarray, room: np.ndarray, experts: int, domain: np.ndarray | None = None
) -> np.ndarray:
    """Bin of each item, int [groups, items], -1 for pads; `room` is the slots of each bin [groups, bins].

    Copies of an expert go to different bins and, where `domain` [bins] is given, to two domains at least.
    """
    groups, bins = room.shape
    at = np.full(item.shape, -1, np.int64)
    if bins == 1:
        return np.where(item >= 0, 0, -1)
    load = np.zeros((groups, bins))
    left = room.astype(np.int64).copy()
    size = np.maximum(room, 1)
    held = np.zeros((groups, experts, bins), np.int8) if groups * experts * bins <= 2**27 else None
    hosted = None if domain is None else np.zeros((groups, experts, int(domain.max()) + 1), bool)
    rows = np.arange(groups)
    turn = (np.arange(bins)[None, :] + rows[:, None] * 7) % bins * 1e-9
    for i in range(item.shape[1]):
        expert = item[:, i]
        key = load / size + turn - 1e-7 * left + FAR * (left <= 0) * 1e3
        if held is not None:
            key += FAR * held[rows, expert]
        else:
            key += FAR * _near(item, at, i, expert, bins)
        if hosted is not None:
            there = hosted[rows, expert]
            key += FAR / 100 * (there[:, domain] & (there.sum(axis=1) < 2)[:, None])
        best = key.argmin(axis=1)
        live = expert >= 0
        at[:, i] = np.where(live, best, -1)
        load[rows, best] += np.where(live, weight[:, i], 0.0)
        left[rows, best] -= live
        if held is not None:
            held[rows[live], expert[live], best[live]] += 1
        if hosted is not None:
            hosted[rows[live], expert[live], domain[best[live]]] = True
    return at


def _near(item: np.ndarray, at: np.ndarray, i: int, expert: np.ndarray, bins: int) -> np.ndarray:
    """Copies of `expert` [groups] already in each bin; copies follow one another in `item`."""
    held = np.zeros((len(item), bins))
    for row, e in enumerate(expert):
        j = i - 1
        while j >= 0 and item[row, j] == e:
            held[row, at[row, j]] += 1
            j -= 1
    return held


def _gather(
    item: np.ndarray, weight: np.ndarray, hosts: np.ndarray, group: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Items of each host of `group`, heaviest first: [layers * hosts, room] experts (-1 pads) and loads."""
    layers = len(item)
    inner = np.full((layers, len(group), room), -1, np.int64)
    inner_weight = np.zeros(inner.shape)
    index = np.full(int(hosts.max(initial=0)) + 2, -1)
    index[group] = np.arange(len(group))
    for layer in range(layers):
        bin_of = index[hosts[layer]]
        order = np.argsort(bin_of, kind="stable")
        order = order[bin_of[order] >= 0]
        which = bin_of[order]
        count = np.bincount(which, minlength=len(group))
        nth = np.arange(len(order)) - (np.cumsum(count) - count)[which]
        inner[layer, which, nth] = item[layer, order]
        inner_weight[layer, which, nth] = weight[layer, order]
    return inner.reshape(-1, room), inner_weight.reshape(-1, room)


def _fill(item: np.ndarray, at: np.ndarray, bins: int, slots: int) -> np.ndarray:
    """Items [groups, items] in their bins `at` as a table [groups, bins, slots]."""
    table = np.full((len(item), bins, slots), -1, np.int32)
    for row in range(len(item)):
        order = np.argsort(at[row], kind="stable")
        order = order[at[row, order] >= 0]
        which = at[row, order]
        count = np.bincount(which, minlength=bins)
        table[row, which, np.arange(len(order)) - (np.cumsum(count) - count)[which]] = item[row, order]
    return table


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
            for rank, slot in _sharing_a_host(rows, domain):
                _swap_out(rows, weight[layer], domain, rank, slot, other_host=True)
    return table


def _sharing_a_host(rows: np.ndarray, domain: np.ndarray) -> list[tuple[int, int]]:
    """One (rank, slot) of each expert of one layer [ranks, slots] with several copies, all on one host."""
    flat, host = rows.ravel(), np.repeat(domain, rows.shape[1])
    held = np.flatnonzero(flat >= 0)
    size = int(flat.max(initial=0)) + 1
    low, high = np.full(size, np.iinfo(np.int64).max), np.full(size, -1)
    np.minimum.at(low, flat[held], host[held])
    np.maximum.at(high, flat[held], host[held])
    together = np.flatnonzero((low == high) & (np.bincount(flat[held], minlength=size) > 1))
    slots = [int(np.flatnonzero(flat == expert)[0]) for expert in together]
    return [divmod(slot, rows.shape[1]) for slot in slots]


def _swap_out(
    rows: np.ndarray,
    weight: np.ndarray,
    domain: np.ndarray,
    rank: int,
    slot: int,
    *,
    other_host: bool = False,
) -> None:
    """Swap a slot of one layer [ranks, slots] with the slot of nearest weight on a rank without its expert.

    With `other_host` that rank is on another host, and what comes back stays on two hosts if it is on two.
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
    if fits.any():
        away = np.where(fits, np.abs(weight - weight[rank, slot]), np.inf)
        other = np.unravel_index(int(away.argmin()), rows.shape)
        for array in (rows, weight):
            array[rank, slot], array[other] = array[other], array[rank, slot]
