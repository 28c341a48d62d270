"""The number of copies of each expert: spare slots go to the experts with the most load per copy.

`loads` is float [layers, experts], each expert's share of its layer's traffic.
"""

from __future__ import annotations

import numpy as np


def copy_counts(loads: np.ndarray, slots: int, ranks: int, *, protect: bool = True) -> np.ndarray:
    """Copies of each expert, int [layers, experts]: at least one each, `slots` in all, at most `ranks` each.

    Spare slots go one at a time to the expert with the most load per copy. With `protect` and at least
    two slots for each expert, every expert gets its second copy before any gets a third.
    """
    layers, experts = loads.shape
    target = min(slots, experts * ranks)
    base = 2 if protect and ranks > 1 and target >= 2 * experts else 1
    weight = loads + 1e-9 * (1 + loads.mean(axis=1, keepdims=True))
    tie_break = (np.arange(experts)[None, :] + np.arange(layers)[:, None] * max(1, target - experts)) % experts
    weight = weight * (1 + 1e-7 * tie_break / experts)
    counts = _fill_level(weight, base, target, ranks)
    rows = np.arange(layers)
    for _ in range(int((target - counts.sum(axis=1)).max(initial=0))):
        short = counts.sum(axis=1) < target
        need = np.where(counts < ranks, weight / counts, -1.0)
        counts[rows, need.argmax(axis=1)] += short
    return counts


def _fill_level(weight: np.ndarray, base: int, target: int, cap: int) -> np.ndarray:
    """Counts with weight/count at the same level for all experts, at most `target` in sum: bisection on the level."""
    low, high = np.zeros((len(weight), 1)), weight.sum(axis=1, keepdims=True) + 1.0
    for _ in range(50):
        middle = (low + high) / 2
        counts = np.clip(np.ceil(weight / np.maximum(middle, 1e-300)), base, cap)
        fits = counts.sum(axis=1, keepdims=True) <= target
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return np.clip(np.ceil(weight / high), base, cap).astype(np.int64)
