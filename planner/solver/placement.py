"""Placement of experts: the rank of each copy, on every layer at once.

`loads` is float [layers, experts], each expert's share of the traffic; `domain` is int [ranks], the index of each
rank's host; tables are int32 [layers, ranks, slots], -1 for an empty slot.
"""

from __future__ import annotations

import numpy as np

from planner.plan.plan import ParityGroup
from planner.solver.balance import balance_by_swaps, peak_over_mean, slot_loads
from planner.solver.parity_groups import parity_slots, slot_parity_groups
from planner.solver.replicas import copy_counts

FAR = 1e9  # larger than any sum of loads, for choices that are wrong rather than slow
PACKED = 5e7  # layers x ranks x copies up to which copies are packed one by one, not dealt out in rounds
TRIES_WORK = 2e6  # layers x copies squared that placements in several orders may cost
NOISE = (0.0, 0.2, 0.6, 0.1)  # how far the orders tried in turn depart from heaviest first
EVEN = 1.0002  # highest load over the mean, or over the busiest copy alone, at which the search stops
PATIENCE = 12  # orders without improvement after which the search stops


def place_afresh(
    loads: np.ndarray, domain: np.ndarray, slots: int, *, protect: str = "copies", speed: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[ParityGroup, ...]]:
    """A fresh placement: slot table int32 [layers, ranks, slots] and parity groups. `speed`, float [ranks], is the
    traffic that each rank should have over the mean; None: all the same."""
    ranks, experts = len(domain), loads.shape[1]
    hosts = int(domain.max()) + 1
    apart = domain if hosts > 2 else np.arange(ranks)
    members = max(1, min(8, (int(apart.max()) + 1) * 3 // 4))
    spare = parity_slots(loads, ranks * slots, ranks, members) if protect == "parity" else 0
    tries = max(1, min(60, int(TRIES_WORK // (len(loads) * (ranks * slots) ** 2))))
    table = _best_start(loads, domain, slots, protect == "copies", spare, tries, speed)
    if speed is not None and not spare:
        room = slots_by_speed(speed, slots, experts, protect=protect == "copies")
        other = _best_start(loads, domain, slots, protect == "copies", spare, tries, speed, room)
        better = peak_over_mean(other, loads, speed) < peak_over_mean(table, loads, speed)
        table = np.where(better[:, None, None], other, table)
    if not spare:
        return table, ()
    groups = tuple(
        ParityGroup(layer=a, slot=b, members=c) for a, b, c in slot_parity_groups(table, experts, apart, members)
    )
    return np.where(table >= experts, -1, table), groups


def slots_by_speed(speed: np.ndarray, slots: int, experts: int, *, protect: bool) -> np.ndarray:
    """The slots of each rank that are filled, int [ranks], at most `slots`: as many as follow its `speed` (float
    [ranks], with a mean of 1), so that even traffic does, too. Experts keep the copies that they have with all slots
    filled: two with `protect` where there is room for them, else one."""
    ranks = len(speed)
    least = 2 * experts if protect and ranks * slots >= 2 * experts else experts
    total = min(ranks * slots, max(least, int(ranks * slots / speed.max())))
    low, high = 0.0, slots / speed.min()
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(slots, middle * speed).sum() < total else (low, middle)
    exact = np.minimum(slots, high * speed)
    room = np.floor(exact + 1e-6).astype(np.int64)
    order = np.argsort(-(exact - room), kind="stable")
    room[order[: max(0, total - int(room.sum()))]] += 1
    return np.minimum(room, slots)


def peak_by_speed(speed: np.ndarray, slots: int, experts: int) -> float:
    """The load of the hottest rank over its share by `speed` that even traffic has at least, with the slots of
    `slots_by_speed`."""
    room = slots_by_speed(speed, slots, experts, protect=True)
    return float((room / room.sum() * len(speed) / speed).max())


def _best_start(
    loads: np.ndarray,
    domain: np.ndarray,
    slots: int,
    protect: bool,
    spare: int,
    tries: int,
    speed: np.ndarray | None,
    room: np.ndarray | None = None,
) -> np.ndarray:
    """The best balanced of placements counted and packed in several orders and improved by swaps, layer by layer."""
    best, lowest, without_gain = None, None, 0
    rng = np.random.default_rng(0)
    for attempt in range(tries):
        noise = 1 + NOISE[attempt % len(NOISE)] * rng.random(loads.shape)
        table = place_experts(loads, domain, slots, protect=protect, parity=spare, order=noise, speed=speed, room=room)
        table = balance_by_swaps(table, loads, domain, speed=speed)
        hottest = peak_over_mean(table, loads, speed)
        if best is None or lowest is None:
            best, lowest = table, hottest
        better = hottest < lowest
        best = np.where(better[:, None, None], table, best)
        lowest = np.where(better, hottest, lowest)
        without_gain = 0 if better.any() else without_gain + 1
        alone = slot_loads(best, loads).max(axis=(1, 2)) * len(domain)
        if without_gain > PATIENCE or (lowest <= np.maximum(alone, 1.0) * EVEN).all():
            break
    assert best is not None
    return best


def place_experts(
    loads: np.ndarray,
    domain: np.ndarray,
    slots: int,
    *,
    protect: bool = True,
    parity: int = 0,
    order: np.ndarray | None = None,
    speed: np.ndarray | None = None,
    room: np.ndarray | None = None,
) -> np.ndarray:
    """A slot table with the copies of an expert on different ranks and on at least two hosts, and then balanced load.

    `protect` gives every expert a second copy when the slots suffice; `parity` is the number of parity slots per layer,
    numbered from `experts` up in the table. `order`, float [layers, experts], are factors near 1 on the loads by which
    copies are counted and sorted, to try other placements. `room`, int [ranks], is the slots of each rank that are
    filled: all when None.

    Items (copies, heaviest first) go to the rank with the least load that has a free slot and no copy of the same
    expert, on a host with no more than its share of the copies. On the largest clusters they are dealt out in rounds
    instead, which takes less time and balances slightly less well.
    """
    layers, experts = loads.shape
    ranks = len(domain)
    wanted = loads if order is None or parity else loads * order
    filled = np.full(ranks, slots) if room is None else room
    counts = copy_counts(wanted, int(filled.sum()) - parity, ranks, protect=protect)
    if parity:
        counts = np.concatenate([counts, np.ones((layers, parity), np.int64)], axis=1)
        loads = np.concatenate([loads, np.zeros((layers, parity))], axis=1)
        experts += parity
    item, weight = _items(counts, loads, order)
    if layers * ranks * item.shape[1] <= PACKED:
        at = _pack(item, weight, np.tile(filled, (layers, 1)), experts, domain, speed)
    else:
        at = _deal(item, domain, slots)
    table = _fill(item, at, ranks, slots)
    return separate_copies(table, slot_loads(table, loads), domain)


def _items(counts: np.ndarray, loads: np.ndarray, order: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Every copy as an item, heaviest first: expert and load, both [layers, items]; padded with -1."""
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


def _pack(
    item: np.ndarray,
    weight: np.ndarray,
    room: np.ndarray,
    experts: int,
    domain: np.ndarray,
    speed: np.ndarray | None = None,
) -> np.ndarray:
    """The rank of each item, int [layers, items], -1 for padding; `room` is the slots of each rank [layers, ranks].

    Copies of an expert go to different ranks, evenly over the hosts that have free slots.
    """
    layers, ranks = room.shape
    at = np.full(item.shape, -1, np.int64)
    load = np.zeros((layers, ranks))
    left = room.astype(np.int64).copy()
    hosts = int(domain.max()) + 1
    hosted = np.zeros((layers, experts, hosts), np.int16)
    rows = np.arange(layers)
    copies = np.zeros((layers, experts), np.int64)
    np.add.at(copies, (rows[:, None], item), item >= 0)
    quota = -(-copies // hosts)
    tie_break = (np.arange(ranks)[None, :] + rows[:, None] * 7) % ranks * 1e-9
    key = load + tie_break - 1e-7 * left + FAR * (left <= 0) * 1e3
    for i in range(item.shape[1]):
        expert = item[:, i]
        if speed is not None:
            key = (load + weight[:, i, None]) / speed + tie_break - 1e-7 * left + FAR * (left <= 0) * 1e3
        cost = key.copy()
        for before in range(i - 1, -1, -1):  # copies of an expert follow one another
            same = np.flatnonzero(item[:, before] == expert)
            if not len(same):
                break
            cost[same, at[same, before]] += FAR
        if (full := hosted[rows, expert] >= quota[rows, expert][:, None]).any():
            cost += FAR / 100 * full[:, domain]
        best = cost.argmin(axis=1)
        live = expert >= 0
        at[:, i] = np.where(live, best, -1)
        load[rows, best] += np.where(live, weight[:, i], 0.0)
        left[rows, best] -= live
        key[rows, best] = load[rows, best] + tie_break[rows, best] - 1e-7 * left[rows, best]
        key[rows, best] += FAR * (left[rows, best] <= 0) * 1e3
        hosted[rows[live], expert[live], domain[best[live]]] += 1
    return at


def _deal(item: np.ndarray, domain: np.ndarray, slots: int) -> np.ndarray:
    """As `_pack`, for the largest clusters: items are dealt out in rounds, forwards and backwards, across hosts."""
    ranks = len(domain)
    position = np.zeros(ranks, np.int64)
    for host in range(int(domain.max()) + 1):
        members = np.flatnonzero(domain == host)
        position[members] = np.arange(len(members))
    order = np.lexsort((domain, position))
    turns = np.concatenate([order if i % 2 == 0 else order[::-1] for i in range(slots)])
    return np.where(item >= 0, turns[None, : item.shape[1]], -1)


def _fill(item: np.ndarray, at: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """The table [layers, ranks, slots] with each item on its rank `at`; both are [layers, items]."""
    layers = len(item)
    table = np.full((layers * ranks, slots), -1, np.int32)
    row, column = np.nonzero(at >= 0)
    owner = row * ranks + at[row, column]
    order = np.argsort(owner, kind="stable")
    nth = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    table[owner[order], nth] = item[row, column][order]
    return table.reshape(layers, ranks, slots)


def separate_copies(table: np.ndarray, weight: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The table with no expert twice on a rank and no expert on one host alone, where a swap can avoid it.

    `weight` is the load of each slot, float [layers, ranks, slots]; swaps are between slots of similar load.
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
    """The experts of one layer [ranks, slots] that have several copies, all on one host."""
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

    With `other_host` that rank is on another host, and the expert that comes in exchange stays on two hosts if it is on
    two. False when there is no such slot.
    """
    expert = rows[rank, slot]
    free = ~(rows == expert).any(axis=1)
    clash = np.isin(rows, rows[rank])
    if other_host:
        free &= domain != domain[rank]
        size = int(rows.max()) + 2
        on_host = np.zeros((size, int(domain.max()) + 1), np.int64)
        np.add.at(on_host, (rows, domain[:, None]), 1)
        on_this_host = on_host[rows, domain[rank]] > 0
        clash |= on_this_host & (on_host[rows, domain[:, None]] < 2)
    fits = free[:, None] & ((rows < 0) | ~clash)
    if not fits.any():
        return False
    away = np.where(fits, np.abs(weight - weight[rank, slot]), np.inf)
    other = np.unravel_index(int(away.argmin()), rows.shape)
    for array in (rows, weight):
        array[rank, slot], array[other] = array[other], array[rank, slot]
    return True
