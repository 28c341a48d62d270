"""The paged KV cache of one rank, and the write of a step, which cannot fail half-way."""

from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Int

from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values `[L, entries, width]`, each as wide as `ModelConfig.cache_widths` says; entry = page * page_size
    + offset. The new keys and values of a step are `[L, R, width]`: rows in place of entries. Leaves are arrays or
    shapes."""

    k: Any
    v: Any


def cache_shapes(cfg: ModelConfig, entries: int) -> KVCache:
    """Shapes of a cache of `entries` positions."""
    k, v = ((cfg.n_layers, entries, width) for width in cfg.cache_widths)
    return KVCache(k=k, v=v)


def empty_cache(cfg: ModelConfig, entries: int, dtype: Any = np.float32) -> KVCache:
    """A cache of `entries` positions on the host, all zeros."""
    shapes = cache_shapes(cfg, entries)
    return KVCache(k=np.zeros(shapes.k, dtype), v=np.zeros(shapes.v, dtype))


def bytes_per_token(cfg: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of cache of one position, over all layers."""
    return cfg.n_layers * sum(cfg.cache_widths) * itemsize


def commit(cache: KVCache, new: KVCache, write_R: Int[ArrayLike, " R"]) -> KVCache:
    """Write a step's new keys and values `[L, R, width]` into the entries `write_R`. Rows of entry DROPPED are dropped.

    Writing a step twice is the same as writing it once: a redone step needs no undo.
    """
    return jax.tree.map(lambda old, rows: old.at[:, write_R].set(rows, mode="drop"), cache, new)
