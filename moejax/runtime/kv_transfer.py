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

from moejax.cache import Cache, cache_shapes
from moejax.config import ModelConfig
from moejax.inputs import Bucket, idle, layout, packed_size
from moejax.known_weights import aligned

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


class EntryWriter:
    """Writes cache entries by the commit programs of a rank's buckets, through host memory that it keeps: memory that a
    process has not touched yet takes several times as long as the copying does."""

    def __init__(self, cfg: ModelConfig, buckets: Sequence[Bucket]) -> None:
        self._cfg = cfg
        self._buckets = tuple(buckets)
        self._rows: dict[int, Cache] = {}

    def write(
        self, cache: Cache, entries: np.ndarray, rows: np.ndarray, commit: Callable[[int], Commit], device: jax.Device
    ) -> Cache:
        """The cache with `rows [L, count, widths]` in these entries, done when this returns; `commit` is the program of
        the bucket of an index. The cache is donated, as in every commit."""
        index = self._index(len(entries))
        size = self._buckets[index].rows
        for at in range(0, len(entries), size):
            some, block = entries[at : at + size], rows[:, at : at + size]
            new = self._kept(index)
            width = new.k.shape[-1]
            new.k[:, : len(some)], new.v[:, : len(some)] = block[..., :width], block[..., width:]
            cache = self._commit(cache, index, some, commit, device)
        return cache

    def warm(self, cache: Cache, count: int, commit: Callable[[int], Commit], device: jax.Device) -> Cache:
        """Write nothing, as `count` entries are written: the first time takes several times as long as the next."""
        return self._commit(cache, self._index(count), np.zeros(0, np.int32), commit, device)

    def _commit(
        self, cache: Cache, index: int, entries: np.ndarray, commit: Callable[[int], Commit], device: jax.Device
    ) -> Cache:
        bucket = self._buckets[index]
        packed = np.concatenate([_writing(bucket, entries), *[idle(bucket)] * (self._cfg.tensor - 1)])
        arguments = jax.device_put((self._kept(index), packed), device)
        return jax.block_until_ready(commit(index)(cache, *arguments))

    def _index(self, count: int) -> int:
        """The bucket with the fewest rows that has room for so many, or that with the most."""
        sizes = [bucket.rows for bucket in self._buckets]
        return sizes.index(min((size for size in sizes if size >= count), default=max(sizes)))

    def _kept(self, index: int) -> Cache:
        if index not in self._rows:
            sizes = cache_shapes(self._cfg, self._buckets[index].rows * self._cfg.tensor)
            self._rows[index] = Cache(*(aligned(np.zeros(size), np.dtype(np.float32)) for size in (sizes.k, sizes.v)))
        return self._rows[index]


class Written(NamedTuple):
    """What a step wrote: its rows `[n]`, the entries they went to, their tokens and positions."""

    rows: np.ndarray
    entries: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray


def written(packed: np.ndarray, bucket: Bucket, entries: int = 0) -> Written:
    """What the step of these packed inputs writes; of a tensor group, whose packed inputs follow one another, for all
    its members, each of which has `entries` in the cache."""
    parts = []
    for t, own in enumerate(packed.reshape(-1, packed_size(bucket))):
        fields, at = {}, 0
        for name, (shape, _) in layout(bucket).items():
            size = math.prod(shape)
            fields[name] = own[at : at + size]
            at += size
        rows = np.flatnonzero(fields["write"] < NOWHERE)
        write, tokens, positions = (fields[name][rows] for name in ("write", "tokens", "positions"))
        parts.append((rows + t * bucket.rows, write + t * entries, tokens, positions))
    return Written(*map(np.concatenate, zip(*parts, strict=True)))


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
