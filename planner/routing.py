"""Which copy of an expert each source rank sends its tokens to."""

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


def route(
    table: np.ndarray, owner: np.ndarray, sources: np.ndarray, experts: int, shares: np.ndarray | None
) -> np.ndarray:
    """Physical slot per source, layer and expert: int32 [sources, layers, experts], -1 where masked.

    `table` is [layers, slots], `owner` the rank id of each slot, `sources` ascending rank ids, and
    `shares` [layers, slots] the number of sources each slot should serve (None: even). A source's own
    copy comes first.
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
        if shares is None:
            turns = _even_turns(lists, count, len(sources), layer)
        else:
            turns = _shared_turns(lists, count, shares[layer], own)
        away = own < 0
        nth = np.cumsum(away, axis=0) - 1
        pick = np.take_along_axis(turns.T, np.where(away, nth, 0), axis=0)
        out[:, layer] = np.where(away, pick, own)
    return out


def _even_turns(lists: np.ndarray, count: np.ndarray, sources: int, layer: int) -> np.ndarray:
    """Slot of the i-th source without an own copy, int32 [experts, sources], dealt out in turn."""
    offset = np.arange(len(lists))[:, None] + layer
    step = (np.arange(sources)[None, :] + offset) % np.maximum(count, 1)[:, None]
    return np.take_along_axis(lists, step, axis=1)


def _shared_turns(lists: np.ndarray, count: np.ndarray, share: np.ndarray, own: np.ndarray) -> np.ndarray:
    """As `_even_turns`, by `share` [slots] sources a slot, less the source that is local to it."""
    local = np.bincount(own[own >= 0], minlength=len(share))
    wanted = np.where(lists >= 0, np.maximum(share - local, 0)[lists], 0)
    ends = np.cumsum(wanted, axis=1)
    turn = np.arange(own.shape[0])
    at = (turn[None, :, None] >= ends[:, None, :]).sum(axis=2)
    return np.take_along_axis(lists, np.minimum(at, np.maximum(count, 1)[:, None] - 1), axis=1)
