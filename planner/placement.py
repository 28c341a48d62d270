"""Experts to slots: how many copies of each, and on which rank each copy sits.

All functions work on every layer at once. `loads` is float [layers, experts], the share of traffic each
expert takes; `domain` is int [ranks], the index of the host each rank is on; tables are int32
[layers, ranks, slots], -1 for an empty slot.
"""

from __future__ import annotations

import numpy as np

FAR = 1e9  # larger than any sum of loads: orders what must not be before what is merely slow


def copy_counts(loads: np.ndarray, slots: int, ranks: int, *, protect: bool = True) -> np.ndarray:
    """Copies of each expert, int [layers, experts]: at least one each, `slots` in all, at most `ranks` each.

    Spare slots go one at a time to the expert with the most load per copy. With `protect` and at least
    two slots for each expert, every expert gets its second copy before any gets a third.
    """
    layers, experts = loads.shape
    target = min(slots, experts * ranks)
    base = 2 if protect and ranks > 1 and target >= 2 * experts else 1
    weight = loads + 1e-9 * (1 + loads.mean(axis=1, keepdims=True))
    turn = (np.arange(experts)[None, :] + np.arange(layers)[:, None] * max(1, target - experts)) % experts
    weight = weight * (1 + 1e-7 * turn / experts)
    counts = _fill_level(weight, base, target, ranks)
    rows = np.arange(layers)
    for _ in range(int((target - counts.sum(axis=1)).max(initial=0))):
        short = counts.sum(axis=1) < target
        need = np.where(counts < ranks, weight / counts, -1.0)
        counts[rows, need.argmax(axis=1)] += short
    return counts


def _fill_level(weight: np.ndarray, base: int, target: int, cap: int) -> np.ndarray:
    """Counts with every weight/count at one level, at most `target` in all: bisection on the level."""
    low, high = np.zeros((len(weight), 1)), weight.sum(axis=1, keepdims=True) + 1.0
    for _ in range(50):
        middle = (low + high) / 2
        counts = np.clip(np.ceil(weight / np.maximum(middle, 1e-300)), base, cap)
        fits = counts.sum(axis=1, keepdims=True) <= target
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return np.clip(np.ceil(weight / high), base, cap).astype(np.int64)


def place(loads: np.ndarray, domain: np.ndarray, slots: int, *, protect: bool = True) -> np.ndarray:
    """A fresh slot table: copies on different hosts, then on different ranks, then the load even.

    Items (copies, heaviest first) go to hosts and then, inside each host, to ranks: always to the one with
    the least load for its size that still has a slot and the fewest copies of the same expert.
    """
    layers, experts = loads.shape
    ranks = len(domain)
    counts = copy_counts(loads, ranks * slots, ranks, protect=protect)
    item, weight = _items(counts, loads)
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
    return separate(table)


def _items(counts: np.ndarray, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every copy as an item, heaviest first: expert and load, both [layers, items]; -1 pads."""
    layers, _experts = counts.shape
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


def _pack(item: np.ndarray, weight: np.ndarray, room: np.ndarray, experts: int) -> np.ndarray:
    """Bin of each item, int [groups, items], -1 for pads; `room` is the slots of each bin [groups, bins]."""
    groups, bins = room.shape
    at = np.full(item.shape, -1, np.int64)
    if bins == 1:
        return np.where(item >= 0, 0, -1)
    load = np.zeros((groups, bins))
    left = room.astype(np.int64).copy()
    size = np.maximum(room, 1)
    held = np.zeros((groups, experts, bins), np.int8) if groups * experts * bins <= 2**27 else None
    rows = np.arange(groups)
    turn = (np.arange(bins)[None, :] + rows[:, None] * 7) % bins * 1e-9
    for i in range(item.shape[1]):
        expert = item[:, i]
        key = load / size + turn - 1e-7 * left + FAR * (left <= 0) * 1e3
        if held is not None:
            key += FAR * held[rows, expert]
        else:
            key += FAR * _near(item, at, i, expert, bins)
        best = key.argmin(axis=1)
        live = expert >= 0
        at[:, i] = np.where(live, best, -1)
        load[rows, best] += np.where(live, weight[:, i], 0.0)
        left[rows, best] -= live
        if held is not None:
            held[rows[live], expert[live], best[live]] += 1
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


def separate(table: np.ndarray) -> np.ndarray:
    """The table with no expert twice on a rank where a swap with another rank can avoid it."""
    table = table.copy()
    ordered = np.sort(table, axis=2)
    double = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
    for layer, rank in np.argwhere(double.any(axis=2)):
        _swap_out(table[layer], int(rank))
    return table


def _swap_out(rows: np.ndarray, rank: int) -> None:
    """Swap second copies on `rank` with a slot of another rank; `rows` is one layer [ranks, slots]."""
    for slot in range(rows.shape[1]):
        expert = rows[rank, slot]
        if expert < 0 or expert not in rows[rank, :slot]:
            continue
        free = ~(rows == expert).any(axis=1)
        fits = free[:, None] & ((rows < 0) | ~np.isin(rows, rows[rank]))
        if fits.any():
            other = np.unravel_index(fits.argmax(), rows.shape)
            rows[rank, slot], rows[other] = rows[other], expert


def adopt(table: np.ndarray, missing: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """The table with every missing expert in an empty slot or in place of a spare copy; nothing else moves.

    `missing` is bool [layers, experts]. Each goes to the rank that has had to load the fewest so far (over
    all layers), then to the one with the least load, in place of the copy that matters least.
    """
    table = table.copy()
    taken = np.zeros(table.shape[1], np.int64)
    for layer in np.flatnonzero(missing.any(axis=1)):
        rows = table[layer]
        counts = np.bincount(rows[rows >= 0], minlength=loads.shape[1])
        lost = np.flatnonzero(missing[layer])
        for expert in lost[np.argsort(-loads[layer, lost], kind="stable")]:
            rank, slot = _spare(rows, counts, taken, loads[layer])
            if rows[rank, slot] >= 0:
                counts[rows[rank, slot]] -= 1
            rows[rank, slot] = expert
            counts[expert] += 1
            taken[rank] += 1
    return table


def _spare(rows: np.ndarray, counts: np.ndarray, taken: np.ndarray, load: np.ndarray) -> tuple[int, int]:
    """The (rank, slot) whose loss hurts least: empty, or one of several copies; `rows` is [ranks, slots]."""
    each = load / np.maximum(counts, 1)
    held = np.where(rows >= 0, each[rows], 0.0)
    spare = (rows < 0) | (counts[rows] > 1)
    scale = held.sum() + 1.0
    after = np.where(rows >= 0, load[rows] / np.maximum(counts[rows] - 1, 1), 0.0)
    key = taken[:, None] + (held.sum(axis=1, keepdims=True) + after) / (4 * scale)
    key = np.where(spare, key, np.inf)
    rank, slot = np.unravel_index(int(key.argmin()), rows.shape)
    return int(rank), int(slot)


def fill_new(table: np.ndarray, new: np.ndarray, loads: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The table with the empty slots of `new` ranks (bool [ranks]) filled with copies; nothing else moves.

    First come experts with a single copy, those on another host before those on this one; then the expert
    with the most load per copy.
    """
    table = table.copy()
    for layer in range(len(table)):
        rows = table[layer]
        for rank, slot in np.argwhere((rows < 0) & new[:, None]):
            counts = np.bincount(rows[rows >= 0], minlength=loads.shape[1])
            key = loads[layer] / np.maximum(counts, 1) + 1e-12 / np.maximum(counts, 1)
            elsewhere = np.zeros(loads.shape[1], bool)
            away = rows[domain != domain[rank]]
            elsewhere[away[away >= 0]] = True
            sole = counts == 1
            key = key + FAR * sole * (1 + elsewhere)
            key[rows[rank][rows[rank] >= 0]] = -np.inf
            if np.isfinite(key.max()):
                rows[rank, slot] = int(key.argmax())
    return table
