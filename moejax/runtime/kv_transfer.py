"""Copies cache entries of a sequence from one rank's cache to another's while both keep serving, and says which entries
a step has written.

Entries in the cache never change, so no step waits while they are copied. They are written by the commit program that
every step uses: nothing is compiled for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.checkpoint.checksums import aligned_array
from moejax.config.kv_cache import KVCache, empty_cache
from moejax.config.mesh import JaxDevice
from moejax.config.model_config import ModelConfig
from moejax.config.step_inputs import Bucket, host_field, idle_inputs, layout, packed_size
from planner.plan.step_layout import DROPPED

Commit = Callable[[KVCache, KVCache, jax.Array], KVCache]


def entry_indices(pages: Sequence[int], page_size: int, first: int, count: int) -> np.ndarray:
    """The flat cache entries of positions `first` .. `first + count - 1` of a sequence in `pages`, int32 `[count]`."""
    at = np.arange(first, first + count)
    return (np.array(pages, np.int32)[at // page_size] * page_size + at % page_size).astype(np.int32)


def read_entries(cache: KVCache, entries: np.ndarray) -> np.ndarray:
    """Keys and values of these entries next to each other, bytes `[L, count, bytes of a layer]`."""
    return _bytes_of(jax.tree.map(lambda part: np.asarray(part)[:, entries], (cache.k, cache.v)))


def read_state(cache: KVCache, place: int) -> np.ndarray:
    """The numbers of a request's state over all layers that have one, float32 `[ModelConfig.state_elements]`."""
    return np.concatenate([np.asarray(leaf)[:, place].reshape(-1) for leaf in jax.tree.leaves(cache.states)])


class EntryWriter:
    """Writes cache entries with the commit programs of a rank's buckets, through host memory that it reuses: memory
    that a process has not touched yet takes several times as long as the copy."""

    def __init__(self, cfg: ModelConfig, buckets: Sequence[Bucket]) -> None:
        self._cfg = cfg
        self._buckets = tuple(buckets)
        self._rows: dict[int, KVCache] = {}

    def write(
        self, cache: KVCache, entries: np.ndarray, rows: np.ndarray, commit: Callable[[int], Commit], device: JaxDevice
    ) -> KVCache:
        """Write `rows`, bytes `[L, count, bytes of a layer]`, into these entries and return the cache when that is
        done. `commit` gives the program of a bucket's index. The cache is donated, as in every commit."""
        index = self._index(len(entries))
        size = self._buckets[index].rows
        for at in range(0, len(entries), size):
            some, block = entries[at : at + size], rows[:, at : at + size]
            new, first = self._host_rows(index), 0
            for leaf in jax.tree.leaves((new.k, new.v)):
                last = first + leaf.shape[-1] * leaf.itemsize
                leaf.view(np.uint8)[:, : len(some)] = block[..., first:last]
                first = last
            cache = self._commit(cache, index, some, commit, device)
        return cache

    def write_state(
        self, cache: KVCache, place: int, state: np.ndarray, commit: Callable[[int], Commit], device: JaxDevice
    ) -> KVCache:
        """Write the state of a request, as `read_state` gives it, to a place and return the cache when that is done."""
        index = self._index(1)
        new, packed, at = self._host_rows(index), idle_inputs(self._buckets[index]), 0
        for leaf in jax.tree.leaves(new.states):
            size = leaf[:, 0].size
            leaf[:, 0] = state[at : at + size].reshape(leaf[:, 0].shape)
            at += size
        host_field(packed, self._buckets[index], "state_write")[0] = place
        return jax.block_until_ready(commit(index)(cache, *jax.device_put((new, packed), device)))

    def warm(self, cache: KVCache, count: int, commit: Callable[[int], Commit], device: JaxDevice) -> KVCache:
        """Run the write of `count` entries with none: the first run takes several times as long as the next."""
        return self._commit(cache, self._index(count), np.zeros(0, np.int32), commit, device)

    def _commit(
        self, cache: KVCache, index: int, entries: np.ndarray, commit: Callable[[int], Commit], device: JaxDevice
    ) -> KVCache:
        bucket = self._buckets[index]
        packed = np.concatenate([_writing(bucket, entries), *[idle_inputs(bucket)] * (self._cfg.tensor - 1)])
        arguments = jax.device_put((self._host_rows(index), packed), device)
        return jax.block_until_ready(commit(index)(cache, *arguments))

    def _index(self, count: int) -> int:
        """Index of the smallest bucket with room for so many rows, or of the largest bucket."""
        sizes = [bucket.rows for bucket in self._buckets]
        return sizes.index(min((size for size in sizes if size >= count), default=max(sizes)))

    def _host_rows(self, index: int) -> KVCache:
        if index not in self._rows:
            bucket = self._buckets[index]
            empty = empty_cache(self._cfg, bucket.rows * self._cfg.tensor, bucket.segments)
            self._rows[index] = jax.tree.map(lambda part: aligned_array(part, part.dtype), empty)
        return self._rows[index]


class WrittenRows(NamedTuple):
    """The rows `[n]` that a step wrote, the cache entries they went to, their tokens and positions."""

    rows: np.ndarray
    entries: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray


def written_rows(packed: np.ndarray, bucket: Bucket, entries: int = 0) -> WrittenRows:
    """The rows that the step of these packed inputs writes. For a tensor group, whose packed inputs follow one another,
    those of all members, each of which has `entries` in the cache."""
    parts = []
    for t, own in enumerate(packed.reshape(-1, packed_size(bucket))):
        fields, at = {}, 0
        for name, (shape, _) in layout(bucket).items():
            size = math.prod(shape)
            fields[name] = own[at : at + size]
            at += size
        rows = np.flatnonzero(fields["write"] < DROPPED)
        write, tokens, positions = (fields[name][rows] for name in ("write", "tokens", "positions"))
        parts.append((rows + t * bucket.rows, write + t * entries, tokens, positions))
    return WrittenRows(*map(np.concatenate, zip(*parts, strict=True)))


def rows_by_entry(new: KVCache, rows: np.ndarray) -> np.ndarray:
    """Keys and values of some rows of a step, bytes `[n, L, bytes of a layer]`: those of one entry lie together."""
    return _bytes_of(jax.tree.map(lambda part: np.asarray(part)[:, rows].swapaxes(0, 1), (new.k, new.v)))


def _bytes_of(rows: tuple[Any, Any]) -> np.ndarray:
    """The bytes of keys, of their scales if there are any, and of values, next to each other on the last axis."""
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in jax.tree.leaves(rows)], axis=-1)


def _writing(bucket: Bucket, entries: np.ndarray) -> np.ndarray:
    """The packed inputs of a step that only writes its first rows to these entries."""
    packed, at = idle_inputs(bucket), 0
    for name, (shape, _) in layout(bucket).items():
        size = int(np.prod(shape))
        if name == "write":
            packed[at : at + len(entries)] = entries
        at += size
    return packed
