"""Routing of tokens: the copy of an expert to which each attention rank sends."""

from __future__ import annotations

import numpy as np


def copy_lists(row: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of each expert of one layer [slots]: padded int32 [experts, most copies], counts [experts]."""
    filled = np.flatnonzero(row >= 0)
    order = filled[np.argsort(row[filled], kind="stable")]
    count = np.bincount(row[filled], minlength=experts)
    first = np.cumsum(count) - count
    lists = np.full((experts, max(1, int(count.max(initial=0)))), -1, np.int32)
    expert = row[order]
    lists[expert, np.arange(len(order)) - first[expert]] = order
    return lists, count


def route(table: np.ndarray, owner: np.ndarray, sources: np.ndarray, experts: int) -> np.ndarray:
    """Physical slot per source, layer and expert: int32 [sources, layers, experts], -1 where masked.

    `table` [layers, slots] is the expert in each slot, `owner` [slots] the rank id of each slot, `sources` the
    ascending ids of the attention ranks. A source that has a copy itself sends there; the others take copies in turn.
    """
    out = np.full((len(sources), len(table), experts), -1, np.int32)
    if not len(sources):
        return out
    position = np.searchsorted(sources, owner).clip(max=len(sources) - 1)
    is_source = sources[position] == owner
    for layer, row in enumerate(table):
        own = np.full((len(sources), experts), -1, np.int32)
        mine = np.flatnonzero((row >= 0) & is_source)[::-1]
        own[position[mine], row[mine]] = mine
        lists, count = copy_lists(row, experts)
        away = own < 0
        nth = np.cumsum(away, axis=0) - 1
        turn = (nth + np.arange(experts) + layer) % np.maximum(count, 1)
        pick = lists[np.arange(experts), turn]
        out[:, layer] = np.where(away, pick, own)
    return out
