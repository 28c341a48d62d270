"""The paged KV cache of one rank with the states beside it, and the write of a step, which cannot fail half-way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

from moejax.config.axes import ArrayLike
from moejax.config.layer_states import LayerStates, commit_states, state_shapes
from moejax.config.model_config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values `[L, entries, width]` of the layers with attention, each as wide as `ModelConfig.cache_widths`
    says; entry = page * page_size + offset. The new keys and values of a step are `[L, R, width]`: rows in place of
    entries. Leaves are arrays, shapes or partition specs."""

    k: Any
    v: Any
    states: LayerStates | None = None
    """The states of layers that have them in place of keys and values."""


def cache_shapes(cfg: ModelConfig, entries: int, states: int = 0) -> KVCache:
    """Shapes and dtypes of a cache of `entries` positions and `states` states; or of what a step of so many rows and
    segments writes."""
    k, v = (
        jax.ShapeDtypeStruct((len(cfg.attention_layers), entries, width), jnp.float32) for width in cfg.cache_widths
    )
    return KVCache(k=k, v=v, states=state_shapes(cfg, states))


def empty_cache(cfg: ModelConfig, entries: int, states: int = 0) -> KVCache:
    """A cache of `entries` positions and `states` states on the host, all zeros."""
    return jax.tree.map(lambda each: np.zeros(each.shape, each.dtype), cache_shapes(cfg, entries, states))


def bytes_per_token(cfg: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of cache of one position, over all layers."""
    return len(cfg.attention_layers) * sum(cfg.cache_widths) * itemsize


def commit(
    cache: KVCache, new: KVCache, write_R: Int[ArrayLike, " R"], write_Z: Int[ArrayLike, " Z"] | None = None
) -> KVCache:
    """Write a step's new keys and values `[L, R, width]` into the entries `write_R`, and its new states to the places
    `write_Z`. Rows of entry DROPPED are dropped.

    Writing a step twice is the same as writing it once: a redone step needs no undo.
    """
    k, v = (old.at[:, write_R].set(rows, mode="drop") for old, rows in ((cache.k, new.k), (cache.v, new.v)))
    if cache.states is None:
        return KVCache(k=k, v=v)
    assert new.states is not None
    assert write_Z is not None
    return KVCache(k=k, v=v, states=commit_states(cache.states, new.states, write_Z))
