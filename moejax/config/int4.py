"""Weights of four bits: integers or FP4 numbers in groups along the inputs, with a scale for each group.

`quantize` makes integers of any weights, 4.5 bits a number: those of llama.cpp's Q4_0 (-8 to 7, the largest number of a
group of 32 at -8 or 8 steps). `from_published` holds what is published in few bits as it is, in the same bits and with
the same scales (`moejax.config.packed_form`): integers less a zero point, or FP4 E2M1.

Scales in float16 of `quantize` are stored 256-fold, so that those from 3e-8 to 255 are held exactly. Published ones are
held in their own bits, as uint16.

Numbers lie in groups of 32, whatever shares a scale. Four of these lie in 32 words of 16 bits, in the order in which
the CPU kernel multiplies them side by side (`moejax/ops/cpu/int4.h`): of group g, number 8 * k + 2 * t + p is nibble k,
from the lowest, of word 8 * t + 2 * g + p. Of two groups that are left over it is in word 8 * (t // 2) + 4 * g + 2 * (t
% 2) + p. Rows are filled up with zeros to whole pairs of groups.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jaxtyping import Float

from moejax.config.packed_form import GROUP, PackedForm

_PAIR = 2 * GROUP
_UNIT = 2.0**-8
"""A stored scale is multiplied with this."""
_WORDS = GROUP // 4
"""Words of a group."""
_SAMPLE = 4
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The sixteen numbers of FP4 E2M1 (OCP Microscaling 1.0, 5.3.3)."""
_MIDDLE = 8
"""The unsigned integer of four bits that is held as zero."""
_SCALES = {"float16": np.uint16, "bfloat16": ml_dtypes.bfloat16, "e8m0": np.uint8, "e4m3": ml_dtypes.float8_e4m3fn}
_BIAS = 127


@struct.dataclass
class Int4:
    """A stack of matrices of four bits `[..., F, D]`: `numbers [..., F, 16 * ceil(D / 64)]` of uint16, four numbers
    each, and `scale [..., F, groups]`. `columns` is D, `group` the columns that share a scale.

    Scales of float16, 256-fold, of bfloat16, and of uint16, the bits of float16, are those of integers, whose zero
    points `more [..., F, groups]` of int8 has, counted from 8 on, if there are some. Exponents of two (uint8) and
    float8_e4m3fn are scales of FP4; of the latter `more [..., F]` of float32 has the factor of each row.
    """

    numbers: Any
    scale: Any
    columns: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False, default=GROUP)
    more: Any = None


class Planes(NamedTuple):
    """Published numbers and what scales each of them, as arrays of the shape of the matrix, so that what moves numbers
    moves all of them: `codes` of four bits, or the bits of FP8 (uint8) and int8, `scale` as it is published, `zero` (of
    integers) and `factor` (of NVFP4), or None. Of eight bits, scales and zero points may be those of each row and
    `group` of columns instead (0: of all columns)."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    factor: np.ndarray | None = None
    group: int = 0


def shape_of(shape: tuple[int, ...], form: PackedForm | None = None) -> Int4:
    """Shapes of a matrix `[..., F, D]`, of what `quantize` makes, or of a published form."""
    *lead, columns = shape
    pairs = -(-columns // _PAIR)
    words = jax.ShapeDtypeStruct((*lead, 2 * pairs * _WORDS), jnp.uint16)
    if form is None:
        return Int4(words, jax.ShapeDtypeStruct((*lead, 2 * pairs), jnp.float16), columns)
    group = form.group or columns
    groups = -(-columns // group)
    scale, more = jax.ShapeDtypeStruct((*lead, groups), _SCALES[form.scale]), None
    if form.zeros:
        more = jax.ShapeDtypeStruct((*lead, groups), jnp.int8)
    if form.scale == "e4m3":
        more = jax.ShapeDtypeStruct(tuple(lead), jnp.float32)
    return Int4(words, scale, columns, _held_group(form, columns), more)


def from_published(planes: Planes, form: PackedForm) -> Int4 | None:
    """Published numbers `[..., F, D]` as they are held; None where scales or zero points are not those of groups in the
    order of the inputs."""
    columns = planes.codes.shape[-1]
    scale, zero = _by_group(planes.scale, form.group or columns), None
    if planes.zero is not None:
        zero = _by_group(planes.zero, form.group or columns)
    if scale is None or (planes.zero is not None and zero is None):
        return None
    more = None
    if form.scale == "e4m3":
        assert planes.factor is not None, "NVFP4 has a factor"
        more = np.ascontiguousarray(planes.factor[..., 0], np.float32)
        if not (planes.factor == more[..., None]).all():
            return None
    elif form.zeros:
        assert zero is not None, "a form with zero points has some"
        more = zero.astype(np.int8) - np.int8(_MIDDLE)
    elif zero is not None and (zero != _MIDDLE).any():
        return None
    codes = planes.codes if form.is_fp4 else planes.codes ^ np.uint8(_MIDDLE)  # signed, in four bits
    *lead, _ = codes.shape
    if missing := -columns % _PAIR:
        codes = np.pad(codes, [*[(0, 0)] * len(lead), (0, missing)])
    held = np.ascontiguousarray(scale).view(_SCALES[form.scale])
    return Int4(_pack(codes.reshape(*lead, -1, GROUP)), held, columns, _held_group(form, columns), more)


def _held_group(form: PackedForm, columns: int) -> int:
    """Columns that share a scale; where all do, whole groups of 32 of them."""
    return form.group or -(-columns // GROUP) * GROUP


def _by_group(plane: np.ndarray, group: int) -> np.ndarray | None:
    """The number of each group `[..., F, groups]`, None where the numbers of a group differ."""
    found = np.ascontiguousarray(plane[..., ::group])
    bits = {1: np.uint8, 2: np.uint16}[plane.dtype.itemsize]
    spread = np.repeat(found.view(bits), group, axis=-1)[..., : plane.shape[-1]]
    return found if np.array_equal(spread, np.ascontiguousarray(plane).view(bits)) else None


def quantize(values: Float[np.ndarray, "*F D"]) -> Int4:
    """Int4 weights near these float32 numbers: of each group, the number that is largest in magnitude is 8 steps from
    zero. Numbers that are int4 weights already, as the first `_SAMPLE` rows show, stay exactly what they are.

    Raises ValueError for a number whose scale would be beyond those of 16 bits, and for one that is not finite.
    """
    if _exact(_in_groups(values.reshape(-1, values.shape[-1])[:_SAMPLE])) is not None:
        found = _exact(_in_groups(values))
        if found is not None:
            return Int4(_pack(found[0]), found[1], values.shape[-1])
    grouped = _in_groups(values)
    highest, lowest = grouped.max(-1), grouped.min(-1)
    largest = np.where(highest > -lowest, highest, lowest)
    with np.errstate(over="ignore"):
        stored = (largest * np.float32(-0.125 / _UNIT)).astype(np.float16)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"a weight is {largest[~np.isfinite(stored)][0]:g}; int4 weights are at most 2,047 in magnitude. "
            "Hold them in int8 or bfloat16."
        )
    scale = stored.astype(np.float32) * np.float32(_UNIT)
    steps = np.rint(grouped / np.where(scale == 0, np.float32(1), scale)[..., None])
    return Int4(_pack(np.clip(steps, -8, 7).astype(np.int8)), stored, values.shape[-1])


@np.errstate(over="ignore", invalid="ignore")
def _exact(grouped: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The integers and scales (as stored) whose products are exactly the numbers `[..., 32]`, None if there are none:
    the largest magnitude of a group is a whole number of its steps, 8 at most."""
    largest = np.abs(grouped).max(-1)
    steps, stored = np.zeros(grouped.shape, np.int8), np.zeros(largest.shape, np.float16)
    open_ = largest != 0
    for most in range(8, 0, -1):
        at = np.nonzero(open_)
        numbers, scale = grouped[at], largest[at] / np.float32(most)
        half = (scale / np.float32(_UNIT)).astype(np.float16)
        counted = np.rint(numbers / scale[:, None])
        fits = (half.astype(np.float32) * np.float32(_UNIT) == scale) & (counted * scale[:, None] == numbers).all(-1)
        sign = np.where((counted > 7).any(-1), -1, 1).astype(np.int8)  # 8 steps are there downwards only
        counted = counted.astype(np.int8) * sign[:, None]
        fits &= (counted < 8).all(-1)
        found = tuple(axis[fits] for axis in at)
        steps[found], stored[found] = counted[fits], half[fits] * sign[fits]
        open_[found] = False
        if not open_.any():
            break
    return None if open_.any() else (steps, stored)


def dequantize(weight: Int4) -> Float[jax.Array, "*F D"]:
    """The numbers in float32."""
    scale = jnp.asarray(weight.scale)
    words = jnp.asarray(weight.numbers)
    *lead, width = words.shape
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)
    nibbles = (words[..., None, :] >> shifts[:, None]) & 15  # [..., k, word]
    if scale.dtype in (jnp.uint8, jnp.float8_e4m3fn):
        steps = jnp.asarray(FP4)[nibbles]
    else:
        steps = jnp.where(nibbles < 8, nibbles.astype(jnp.float32), nibbles.astype(jnp.float32) - 16)
    whole = width // (4 * _WORDS) * 4 * _WORDS
    first = len(lead)
    quads = steps[..., :whole].reshape(*lead, 4, -1, 4, 4, 2)  # k, quad, t, g, p
    order = (*range(first), first + 1, first + 3, first, first + 2, first + 4)
    numbers = quads.transpose(order).reshape(*lead, -1, GROUP)
    if whole < width:
        pair = steps[..., whole:].reshape(*lead, 4, 2, 2, 2, 2)  # k, t // 2, g, t % 2, p
        order = (*range(first), first + 2, first, first + 1, first + 3, first + 4)
        numbers = jnp.concatenate([numbers, pair.transpose(order).reshape(*lead, 2, GROUP)], axis=-2)
    numbers = numbers.reshape(*lead, -1)[..., : weight.columns]
    spread = lambda each: jnp.repeat(each, weight.group, axis=-1)[..., : weight.columns]  # noqa: E731
    if weight.more is not None and scale.dtype != jnp.float8_e4m3fn:
        numbers = numbers - spread(jnp.asarray(weight.more).astype(jnp.float32))
    return numbers * spread(_plain_scale(weight))


def _plain_scale(weight: Int4) -> Float[jax.Array, "*F groups"]:
    """Scales in float32."""
    scale = jnp.asarray(weight.scale)
    if scale.dtype == jnp.uint8:
        return jnp.ldexp(jnp.float32(1), scale.astype(jnp.int32) - _BIAS)
    if scale.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(scale, jnp.float16).astype(jnp.float32)
    plain = scale.astype(jnp.float32)
    if scale.dtype == jnp.float8_e4m3fn:
        return plain * jnp.asarray(weight.more)[..., None]
    return plain * _UNIT if scale.dtype == jnp.float16 else plain


def _in_groups(values: np.ndarray) -> np.ndarray:
    """Numbers `[..., F, D]` in float32 as `[..., F, groups, 32]`, filled up with zeros to an even number of groups."""
    *lead, columns = values.shape
    values = np.asarray(values, np.float32)
    if missing := -columns % _PAIR:
        values = np.pad(values, [*[(0, 0)] * len(lead), (0, missing)])
    return values.reshape(*lead, -1, GROUP)


def _pack(steps: np.ndarray) -> np.ndarray:
    """Integers `[..., F, groups, 32]` as words `[..., F, 8 * groups]`."""
    *lead, groups, _ = steps.shape
    nibbles = steps.astype(np.uint16) & 15
    first, whole = len(lead), groups // 4 * 4
    quads = np.moveaxis(nibbles[..., :whole, :].reshape(*lead, -1, 4, 4, 4, 2), first + 2, 0)  # k, ..., quad, g, t, p
    words = _words(quads.swapaxes(first + 2, first + 3)).reshape(*lead, -1)
    if whole == groups:
        return words
    pair = np.moveaxis(
        nibbles[..., whole:, :].reshape(*lead, 2, 4, 2, 2, 2), first + 1, 0
    )  # k, ..., g, t // 2, t % 2, p
    return np.concatenate([words, _words(pair.swapaxes(first + 1, first + 2)).reshape(*lead, -1)], axis=-1)


def _words(nibbles: np.ndarray) -> np.ndarray:
    """The four nibbles of each word, the lowest first."""
    return nibbles[0] | nibbles[1] << 4 | nibbles[2] << 8 | nibbles[3] << 12
