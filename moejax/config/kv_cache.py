"""The paged KV cache of one rank with the states beside it, and the write of a step, which cannot fail half-way.

Keys and values are held in the cache format of the model (`ModelConfig.cache_format`): float32, bfloat16, or int8 or
fp8 (e4m3, arXiv 2209.05433) numbers with a float32 scale for each part of a row, which is a head's key or value. A step
brings its new rows into that format before any query sees them. So it makes no difference to a query which of its
positions were cached and which are new, and a request that is computed again has the same bits (docs/decisions/0027).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.layer_states import LayerStates, commit_states, state_shapes
from moejax.config.model_config import ModelConfig

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The number that the largest of a part becomes in each format that has scales."""
STORED = {"float32": jnp.float32, "bfloat16": jnp.uint16, "int8": jnp.int8, "fp8": jnp.uint8}
"""The type of the numbers in memory. Narrow floats are kept as their bits: XLA widens whole arrays of them to write
single rows."""
_FLOATS = {jnp.dtype(jnp.uint16): jnp.bfloat16, jnp.dtype(jnp.uint8): jnp.float8_e4m3fn}
"""The floats that bits are."""
SMALLEST = 1e-30
"""A part whose largest number is below this becomes zeros: its scale would not be a normal number."""


@struct.dataclass
class Scaled:
    """Rows whose numbers `[..., width]` are multiplied by a scale of their part, `[..., parts]` float32. Leaves are
    arrays, shapes or partition specs."""

    numbers: Any
    scale: Any
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    """Numbers of each part; their sum is the width."""


@struct.dataclass
class KVCache:
    """Keys and values `[L, entries, width]` of the layers with attention, each as wide as `ModelConfig.cache_parts`
    says, arrays or `Scaled`; entry = page * page_size + offset. The new keys and values of a step are `[L, R, width]`:
    rows in place of entries. Leaves are arrays, shapes or partition specs."""

    k: Any
    v: Any
    states: LayerStates | None = None
    """The states of layers that have them in place of keys and values."""

    @property
    def entries(self) -> int:
        """Entries, or rows of a step, of one layer `[..., entries, width]`."""
        return numbers_of(self.k).shape[-2]


def numbers_of(rows: Any) -> Any:
    """The numbers `[..., width]` of keys or of values, without their scales."""
    return rows.numbers if isinstance(rows, Scaled) else rows


def cache_shapes(cfg: ModelConfig, entries: int, states: int = 0) -> KVCache:
    """Shapes and dtypes of a cache of `entries` positions and `states` states; or of what a step of so many rows and
    segments writes."""
    lead = (len(cfg.attention_layers), entries)

    def shape(sizes: tuple[int, ...]) -> Any:
        numbers = jax.ShapeDtypeStruct((*lead, sum(sizes)), STORED[cfg.cache_format])
        if cfg.cache_format not in LARGEST:
            return numbers
        return Scaled(numbers, jax.ShapeDtypeStruct((*lead, len(sizes)), jnp.float32), sizes)

    k, v = map(shape, cfg.cache_parts)
    return KVCache(k=k, v=v, states=state_shapes(cfg, states))


def empty_cache(cfg: ModelConfig, entries: int, states: int = 0) -> KVCache:
    """A cache of `entries` positions and `states` states on the host, all zeros."""
    return jax.tree.map(lambda each: np.zeros(each.shape, each.dtype), cache_shapes(cfg, entries, states))


def bytes_per_token(cfg: ModelConfig) -> int:
    """Bytes of cache of one position, over all layers."""
    shapes = cache_shapes(cfg, 1)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((shapes.k, shapes.v)))


def to_cache_format(cfg: ModelConfig, k: Float[ArrayLike, "*R Wk"], v: Float[ArrayLike, "*R Wv"]) -> KVCache:
    """New keys and values as the cache holds them. A part is scaled by its own numbers alone, so that a row does not
    depend on its batch; one with numbers that are not finite has a scale that is not. Rows that are narrower than those
    of the cache end in zeros."""
    rows = zip((k, v), cfg.cache_parts, strict=True)
    return KVCache(*(_rounded(_widened(values, sum(sizes)), sizes, cfg.cache_format) for values, sizes in rows))


def _widened(values: Float[ArrayLike, "*R W"], width: int) -> Float[ArrayLike, "*R wide"]:
    """Rows with zeros up to this width."""
    missing = width - values.shape[-1]
    return jnp.pad(values, (*((0, 0),) * (values.ndim - 1), (0, missing))) if missing else values


def from_cache_format(rows: Any) -> Float[ArrayLike, "*R W"]:
    """Keys or values `[..., width]` in float32, from rows as the cache holds them."""
    numbers = numbers_of(rows)
    if numbers.dtype in _FLOATS:
        numbers = jax.lax.bitcast_convert_type(numbers, _FLOATS[numbers.dtype])
    wide = numbers.astype(jnp.float32)
    return wide * _by_number(rows.scale, rows.sizes) if isinstance(rows, Scaled) else wide


def commit(
    cache: KVCache, new: KVCache, write_R: Int[ArrayLike, " R"], write_Z: Int[ArrayLike, " Z"] | None = None
) -> KVCache:
    """Write a step's new keys and values `[L, R, width]` into the entries `write_R`, and its new states to the places
    `write_Z`. Rows of entry DROPPED are dropped.

    Writing a step twice is the same as writing it once: a redone step needs no undo.
    """
    write = lambda old, rows: old.at[:, write_R].set(rows, mode="drop")  # noqa: E731
    k, v = jax.tree.map(write, (cache.k, cache.v), (new.k, new.v))
    if cache.states is None:
        return KVCache(k=k, v=v)
    assert new.states is not None
    assert write_Z is not None
    return KVCache(k=k, v=v, states=commit_states(cache.states, new.states, write_Z))


def _rounded(values: Float[ArrayLike, "*R W"], sizes: tuple[int, ...], form: str) -> Any:
    if form == "float32":
        return values.astype(jnp.float32)
    if form == "bfloat16":
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    parts = jnp.split(values, np.cumsum(sizes)[:-1], axis=-1) if len(set(sizes)) > 1 else None
    if parts is None:
        highest = jnp.abs(values.reshape(*values.shape[:-1], len(sizes), -1)).max(-1)
    else:
        highest = jnp.stack([jnp.abs(part).max(-1) for part in parts], axis=-1)
    factor = jnp.where(highest >= SMALLEST, np.float32(LARGEST[form]) / highest, 0.0)
    near = values * _by_number(factor, sizes)
    if form == "int8":
        numbers = jnp.rint(near).astype(jnp.int8)
    else:
        numbers = jax.lax.bitcast_convert_type(near.astype(jnp.float8_e4m3fn), jnp.uint8)
    # Multiplied by a constant: XLA makes a product of a division by one, and other backends might not.
    scale = jnp.where(highest < SMALLEST, 0.0, highest * np.float32(1 / LARGEST[form]))
    return Scaled(numbers, scale, sizes)


def _by_number(of_parts: Float[ArrayLike, "*R parts"], sizes: tuple[int, ...]) -> Float[jax.Array, "*R W"]:
    """A number of each part, once for each number in it."""
    if len(set(sizes)) == 1:
        return jnp.repeat(of_parts, sizes[0], axis=-1)
    return of_parts[..., np.repeat(np.arange(len(sizes)), sizes)]
