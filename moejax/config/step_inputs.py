"""The inputs of one step on one rank, packed into a single int32 vector so that a step costs one transfer.

A bucket has B decode segments of one row each, then G prefill tiles of TILE rows; R rows and Z segments in
all. The front packs the fields in the order below; float fields travel as their bits.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Float, Int, UInt32

from moejax.config.axes import ArrayLike
from planner.plan.step_layout import DROPPED, TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shape of a step: decode rows, prefill tiles, and the most pages of a segment."""

    decode: int
    tiles: int
    max_pages: int
    states: bool = False
    """The step reads and writes states of requests (`moejax.config.layer_states`)."""

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
    """One rank's part of a step. `serving.engine.batch.prepare_inputs` makes these fields and explains them."""

    tokens: Int[ArrayLike, " R"]
    positions: Int[ArrayLike, " R"]
    page_table: Int[ArrayLike, "Z M"]
    cached: Int[ArrayLike, " Z"]
    new_base: Int[ArrayLike, " Z"]
    write: Int[ArrayLike, " R"]
    sample_row: Int[ArrayLike, " Z"]
    temperature: Float[ArrayLike, " Z"]
    top_k: Int[ArrayLike, " Z"]
    top_p: Float[ArrayLike, " Z"]
    min_p: Float[ArrayLike, " Z"]
    seed: UInt32[ArrayLike, " Z"]
    sample_position: Int[ArrayLike, " Z"]
    read: Int[ArrayLike, " R"]
    state_read: Int[ArrayLike, " Z"] | None = None
    state_write: Int[ArrayLike, " Z"] | None = None


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
        **({"state_read": ((Z,), i32), "state_write": ((Z,), i32)} if bucket.states else {}),
    }


def packed_size(bucket: Bucket) -> int:
    """Length of the packed vector."""
    return sum(math.prod(shape) for shape, _ in layout(bucket).values())


def host_field(packed: np.ndarray, bucket: Bucket, name: str) -> np.ndarray:
    """One field of a packed vector, on the host."""
    at = 0
    for field, (shape, dtype) in layout(bucket).items():
        size = math.prod(shape)
        if field == name:
            return packed[at : at + size].view(dtype).reshape(shape)
        at += size
    raise KeyError(name)


def unpack(packed: Int[ArrayLike, " size"], bucket: Bucket) -> StepInputs:
    """The fields of a packed vector `[packed_size]`, inside a compiled program."""
    fields, at = {}, 0
    for name, (shape, dtype) in layout(bucket).items():
        size = math.prod(shape)
        fields[name] = lax.bitcast_convert_type(packed[at : at + size], jnp.dtype(dtype)).reshape(shape)
        at += size
    return StepInputs(**fields)


def idle_inputs(bucket: Bucket) -> np.ndarray:
    """The packed vector of a rank without work in a step."""
    parts = []
    for name, (shape, dtype) in layout(bucket).items():
        fill = {"positions": -1, "write": DROPPED, "top_p": 1.0, "state_write": DROPPED}.get(name, 0)
        value = np.full(shape, fill, dtype)
        if name in ("new_base", "sample_row"):
            tile_rows = bucket.decode + TILE * np.arange(bucket.tiles)
            value = np.concatenate([np.arange(bucket.decode), tile_rows]).astype(dtype)
        parts.append(value.reshape(-1).view(np.int32))
    return np.concatenate(parts)
