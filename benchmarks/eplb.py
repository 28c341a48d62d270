"""The placement to compare with: expert placement as DeepSeek's EPLB describes it, written from that description.

Global policy: give each spare slot to the expert with the most load per copy, then hand the copies, heaviest
first, to the rank with the least load that has a slot left. It does not look at which host or rank the
other copies of an expert are on.
"""

from __future__ import annotations

import heapq

import numpy as np


def eplb_place(loads: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """EPLB's slot table, int32 [layers, ranks, slots], for `loads` float [layers, experts]."""
    layers, experts = loads.shape
    counts = np.ones((layers, experts), np.int64)
    rows = np.arange(layers)
    for _ in range(ranks * slots - experts):
        counts[rows, (loads / counts).argmax(axis=1)] += 1
    table = np.full((layers, ranks, slots), -1, np.int32)
    for layer in range(layers):
        item = np.repeat(np.arange(experts), counts[layer])
        weight = (loads[layer] / counts[layer])[item]
        lightest = [(0.0, rank, 0) for rank in range(ranks)]
        for i in np.argsort(-weight, kind="stable").tolist():
            total, rank, used = heapq.heappop(lightest)
            table[layer, rank, used] = item[i]
            if used + 1 < slots:
                heapq.heappush(lightest, (total + float(weight[i]), rank, used + 1))
    return table
