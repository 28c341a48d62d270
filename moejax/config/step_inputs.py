"""What a rank gets for one step: a single int32 vector, so that a step costs one transfer.

A bucket has B decode segments of one row each, then G prefill tiles of TILE rows; R rows and Z segments in
all. The front packs the fields in the order below; float fields travel as their bits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

TILE = 32
"""Rows of one prefill segment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shape of a step: decode rows, prefill tiles, and pages a segment may have."""

    decode: int
    tiles: int
    max_pages: int

    @property
    def rows(self) -> int:
        """R, the rows of a step."""
        return self.decode + TILE * self.tiles

    @property
    def segments(self) -> int:
        """Z, the segments of a step; each may sample one token."""
        return self.decode + self.tiles


@struct.dataclass
class StepInputs:
    """One rank's part of a step. Meanings as in `serving.batch.assemble`, which makes them."""

    tokens: jax.Array
    positions: jax.Array
    page_table: jax.Array
    cached: jax.Array
    new_base: jax.Array
    write: jax.Array
    sample_row: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    sample_position: jax.Array
    read: jax.Array


def layout(bucket: Bucket) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each field, in packing order."""
    R, Z = bucket.rows, bucket.segments
    i32, f32, u32 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
    return {
        "tokens": ((R,), i32),
        "positions": ((R,), i32),
        "page_table": ((Z, bucket.max_pages), i32),
        "cached": ((Z,), i32),
        "new_base": ((Z,), i32),
        "write": ((R,), i32),
        "sample_row": ((Z,), i32),
        "temperature": ((Z,), f32),
        "top_k": ((Z,), i32),
        "top_p": ((Z,), f32),
        "min_p": ((Z,), f32),
        "seed": ((Z,), u32),
        "sample_position": ((Z,), i32),
        "read": ((R,), i32),
    }


def packed_size(bucket: Bucket) -> int:
    """Length of the packed vector."""
    return sum(math.prod(shape) for shape, _ in layout(bucket).values())


def unpack(packed: jax.Array, bucket: Bucket) -> StepInputs:
    """The fields of a packed vector `[packed_size]`, inside a compiled program."""
    fields, at = {}, 0
    for name, (shape, dtype) in layout(bucket).items():
        size = math.prod(shape)
        fields[name] = lax.bitcast_convert_type(packed[at : at + size], jnp.dtype(dtype)).reshape(shape)
        at += size
    return StepInputs(**fields)


def idle(bucket: Bucket) -> np.ndarray:
    """The packed vector of a rank that has nothing to do in a step."""
    parts = []
    for name, (shape, dtype) in layout(bucket).items():
        fill = {"positions": -1, "write": 2**30, "top_p": 1.0}.get(name, 0)
        value = np.full(shape, fill, dtype)
        if name in ("new_base", "sample_row"):
            tile_rows = bucket.decode + TILE * np.arange(bucket.tiles)
            value = np.concatenate([np.arange(bucket.decode), tile_rows]).astype(dtype)
        parts.append(value.reshape(-1).view(np.int32))
    return np.concatenate(parts)
