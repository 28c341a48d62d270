"""The paged key/value cache of one rank, and the write that cannot fail half-way."""

from typing import Any

import jax
import numpy as np
from flax import struct

from moejax.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values `[L, entries, width]`, each as wide as `ModelConfig.cache_widths` says; entry = page * page_size
    + offset. The new keys and values of a step have its rows in place of entries."""

    k: Any
    v: Any


def cache_shapes(cfg: ModelConfig, entries: int) -> Cache:
    """Shapes of a cache of `entries` positions."""
    k, v = ((cfg.n_layers, entries, width) for width in cfg.cache_widths)
    return Cache(k=k, v=v)


def empty_cache(cfg: ModelConfig, entries: int, dtype: Any = np.float32) -> Cache:
    """A cache of `entries` positions on the host, all zero."""
    shapes = cache_shapes(cfg, entries)
    return Cache(k=np.zeros(shapes.k, dtype), v=np.zeros(shapes.v, dtype))


def bytes_per_token(cfg: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of cache one position takes, over all layers."""
    return cfg.n_layers * sum(cfg.cache_widths) * itemsize


def commit(cache: Cache, new: Cache, write_R: jax.Array) -> Cache:
    """Write a step's new keys and values `[L, R, width]` into the entries `write_R`; 2**30 and above means nowhere.

    Writing the same step twice leaves the cache as once: a redone step needs no undo.
    """
    return jax.tree.map(lambda old, rows: old.at[:, write_R].set(rows, mode="drop"), cache, new)
