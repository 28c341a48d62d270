"""Cache entries of a sequence out of one rank's cache and into another's, while both go on serving; and what a step has
just written, as the entries it is.

Entries of positions that are in the cache never change, so that copying them needs nobody else to wait. They are
written by the commit program that every step uses: nothing is compiled for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moejax.cache import Cache
from moejax.inputs import Bucket, idle, layout

NOWHERE = 2**30
"""Where rows of padding are written to; see `serving.batch.DROPPED`."""

Commit = Callable[[Cache, Cache, jax.Array], Cache]


def entries_of(pages: Sequence[int], page_size: int, first: int, count: int) -> np.ndarray:
    """The flat cache entries of positions `first` .. `first + count - 1` of a sequence in `pages`, int32 `[count]`."""
    at = np.arange(first, first + count)
    return (np.array(pages, np.int32)[at // page_size] * page_size + at % page_size).astype(np.int32)


def read_entries(cache: Cache, entries: np.ndarray) -> np.ndarray:
    """Keys and values of these entries next to each other, float32 `[L, count, widths]`."""
    return np.concatenate([np.asarray(part)[:, entries] for part in (cache.k, cache.v)], axis=-1)


def write_entries(
    cache: Cache, entries: np.ndarray, rows: np.ndarray, bucket: Bucket, commit: Commit, device: jax.Device
) -> Cache:
    """The cache with `rows [L, count, widths]` in these entries, written by the commit program of `bucket`.

    The cache is donated, as in every commit.
    """
    for at in range(0, len(entries), bucket.rows):
        some, block = entries[at : at + bucket.rows], rows[:, at : at + bucket.rows]
        new = Cache(*(np.zeros((len(rows), bucket.rows, part.shape[-1]), rows.dtype) for part in (cache.k, cache.v)))
        new.k[:, : len(some)], new.v[:, : len(some)] = np.split(block, [new.k.shape[-1]], axis=-1)
        cache = commit(cache, *jax.device_put((new, _writing(bucket, some)), device))
    return cache


class Written(NamedTuple):
    """What a step wrote: its rows `[n]`, the entries they went to, their tokens and positions."""

    rows: np.ndarray
    entries: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray


def written(packed: np.ndarray, bucket: Bucket) -> Written:
    """What the step of these packed inputs writes."""
    fields, at = {}, 0
    for name, (shape, _) in layout(bucket).items():
        size = math.prod(shape)
        fields[name] = packed[at : at + size]
        at += size
    rows = np.flatnonzero(fields["write"] < NOWHERE)
    return Written(rows, *(fields[name][rows] for name in ("write", "tokens", "positions")))


def rows_by_entry(new: Cache, rows: np.ndarray) -> np.ndarray:
    """Keys and values of some rows of a step, `[n, L, widths]`: what belongs to one entry lies together."""
    parts = [np.asarray(part)[:, rows].swapaxes(0, 1) for part in (new.k, new.v)]
    return np.concatenate(parts, axis=-1)


def _writing(bucket: Bucket, entries: np.ndarray) -> np.ndarray:
    """The packed inputs of a step that does nothing but write its first rows to these entries."""
    packed, at = idle(bucket), 0
    for name, (shape, _) in layout(bucket).items():
        size = int(np.prod(shape))
        if name == "write":
            packed[at : at + len(entries)] = entries
        at += size
    return packed
