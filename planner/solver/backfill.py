"""Lost experts to the slots of survivors, moving nothing else.

Tables are int32 [layers, ranks, slots], -1 for an empty slot and numbers from `experts` up for parity
slots, which give way after all spare copies; `loads` is float [layers, experts].
"""

from __future__ import annotations

import numpy as np

FAR = 1e9  # larger than any load: what must come first


def adopt(table: np.ndarray, missing: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """The table with every missing expert in an empty slot or in place of a spare copy; nothing else moves.

    `missing` is bool [layers, experts]. Each goes to the rank that has had to load the fewest so far (over
    all layers), then to the one with the least load, in place of the copy that matters least.
    """
    table = table.copy()
    taken = np.zeros(table.shape[1], np.int64)
    for layer in np.flatnonzero(missing.any(axis=1)):
        rows = table[layer]
        counts = np.bincount(rows[rows >= 0], minlength=loads.shape[1] + 1)
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


def fill_new(table: np.ndarray, new: np.ndarray, loads: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The table with the empty slots of `new` ranks (bool [ranks]) filled with copies; nothing else moves.

    First come experts with a single copy, those on another host before those on this one; then the expert
    with the most load per copy.
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
