"""Weights of eight bits: int8 with a scale for each output, and FP8 or int8 as they are published.

Published numbers are held in their own bits (`moejax.config.packed_form`): FP8 E4M3 or integers, with the scales of
tensors, outputs, blocks of outputs and inputs, or groups of inputs. They stand for (number - zero point) * scale in
float32, which is not rounded again. Scales of whole rows are float32 here, which has those of any format exactly.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jaxtyping import Float

from moejax.config.int4 import Planes
from moejax.config.packed_form import PackedForm

_SCALES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "e8m0": np.uint8}
_BIAS = 127
"""Of the exponents E8M0 (OCP Microscaling 1.0, 5.4.1)."""
_MOST_ZERO = 127
"""Of the zero points that integers of eight bits hold."""


@struct.dataclass
class Int8:
    """A stack of int8 matrices: `numbers [..., F, D]`, each row multiplied by its `scale [..., F]`."""

    numbers: Any
    scale: Any


@struct.dataclass
class EightBit:
    """A stack of published matrices of eight bits: `numbers [..., F, D]`, the bits of FP8 E4M3 (uint8) or integers
    (int8).

    `scale [..., ceil(F / rows), ceil(D / group)]` is that of `rows` outputs and `group` inputs (0: of all inputs), in
    float32, bfloat16, float16, or as an exponent of two (uint8); `zero` of the same shape is subtracted from integers
    first, if there is one.
    """

    numbers: Any
    scale: Any
    group: int = struct.field(pytree_node=False, default=0)
    rows: int = struct.field(pytree_node=False, default=1)
    zero: Any = None


def shape_of(shape: tuple[int, ...], form: PackedForm) -> EightBit:
    """Shapes of a matrix `[..., F, D]` in a published form of eight bits."""
    *lead, rows, columns = shape
    groups = (*lead, -(-rows // form.rows), -(-columns // form.group) if form.group else 1)
    return EightBit(
        jax.ShapeDtypeStruct(shape, jnp.uint8 if form.numbers == "fp8" else jnp.int8),
        jax.ShapeDtypeStruct(groups, _SCALES[form.scale]),
        form.group,
        form.rows,
        jax.ShapeDtypeStruct(groups, jnp.int8) if form.zeros else None,
    )


def from_published(planes: Planes, form: PackedForm) -> EightBit | None:
    """Published numbers `[..., F, D]` as they are held; None where scales or zero points are not those of blocks or
    groups in order."""
    columns = planes.codes.shape[-1]
    scale = _by_block(planes.scale, columns, form)
    zero = None if planes.zero is None else _by_block(planes.zero, columns, form)
    if scale is None or (zero is None and planes.zero is not None):
        return None
    if not form.zeros and zero is not None and zero.any():
        return None
    if form.zeros and (zero is None or np.abs(zero).max() > _MOST_ZERO):
        return None
    held = None if zero is None or not form.zeros else np.ascontiguousarray(zero.astype(np.int8))
    scale = np.ascontiguousarray(_in_format(scale, form))
    return EightBit(np.ascontiguousarray(planes.codes), scale, form.group, form.rows, held)


def spread_over_columns(planes: Planes) -> Planes:
    """The planes with a scale and a zero point for each column, whatever they stood for."""
    columns = planes.codes.shape[-1]

    def spread(plane: np.ndarray | None) -> np.ndarray | None:
        if plane is None or plane.shape[-1] == columns:
            return plane
        return np.repeat(plane, planes.group or columns, axis=-1)[..., :columns]

    scale = spread(planes.scale)
    assert scale is not None, "there are scales"
    return planes._replace(scale=scale, zero=spread(planes.zero), group=1)


def _by_block(plane: np.ndarray, columns: int, form: PackedForm) -> np.ndarray | None:
    """The number of each block `[..., F / rows, D / group]`, from those of each row and each column or group; None
    where the numbers of a block differ."""
    group = form.group or columns
    if plane.shape[-1] == columns and group > 1:
        found = plane[..., ::group]
        if not _same_bits(np.repeat(found, group, axis=-1)[..., :columns], plane):
            return None
        plane = found
    found = plane[..., :: form.rows, :]
    spread = np.repeat(found, form.rows, axis=-2)[..., : plane.shape[-2], :]
    return found if form.rows == 1 or _same_bits(spread, plane) else None


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    return np.array_equal(np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits))


def _in_format(scale: np.ndarray, form: PackedForm) -> np.ndarray:
    """Scales in the format in which they are held. Exponents of two are bytes where they come from."""
    if form.scale == "e8m0":
        return scale.view(np.uint8)
    if scale.dtype.itemsize == 1:
        return np.ldexp(np.float32(1), scale.view(np.uint8).astype(np.int32) - _BIAS)
    return scale.astype(_SCALES[form.scale], copy=False)


def dequantize(weight: Int8 | EightBit) -> Float[jax.Array, "*F D"]:
    """The numbers in float32."""
    numbers = jnp.asarray(weight.numbers)
    if isinstance(weight, Int8):
        return numbers.astype(jnp.float32) * jnp.asarray(weight.scale)[..., None]
    if numbers.dtype == jnp.uint8:
        numbers = jax.lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn)
    rows, columns = numbers.shape[-2:]

    def spread(blocks: jax.Array) -> jax.Array:
        by_row = jnp.repeat(blocks, weight.rows, axis=-2)[..., :rows, :] if weight.rows > 1 else blocks
        return jnp.repeat(by_row, weight.group, axis=-1)[..., :columns] if weight.group else by_row

    numbers = numbers.astype(jnp.float32)
    if weight.zero is not None:
        numbers = numbers - spread(jnp.asarray(weight.zero).astype(jnp.float32))
    scale = jnp.asarray(weight.scale)
    if scale.dtype == jnp.uint8:
        scale = jnp.ldexp(jnp.float32(1), scale.astype(jnp.int32) - _BIAS)
    return numbers * spread(scale.astype(jnp.float32))
