"""The paged key/value cache of one rank, and the write that cannot fail half-way."""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values `[L, entries, K*H]`; entry = page * page_size + offset."""

    k: jax.Array
    v: jax.Array


def empty_cache(cfg: ModelConfig, entries: int, dtype=jnp.float32) -> Cache:
    """A cache of `entries` positions, all zero."""
    shape = (cfg.n_layers, entries, cfg.n_kv_heads * cfg.d_head)
    return Cache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def bytes_per_token(cfg: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of cache one position takes, over all layers."""
    return 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * itemsize


def commit(cache: Cache, new_kv: jax.Array, write_R: jax.Array) -> Cache:
    """Write a step's new keys and values `[L, 2, R, K*H]` into the entries `write_R`; 2**30 means nowhere.

    Writing the same step twice leaves the cache as once: a redone step needs no undo.
    """
    return Cache(
        k=cache.k.at[:, write_R].set(new_kv[:, 0], mode="drop"),
        v=cache.v.at[:, write_R].set(new_kv[:, 1], mode="drop"),
    )
