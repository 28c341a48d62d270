"""Weights of four bits: integers in groups of 32 along the inputs, with a scale of 16 bits for each group.

4.5 bits a number. The integers are those of llama.cpp's Q4_0 (-8 to 7, the largest number of a group at -8 or 8 steps).
Scales are float16, stored 256-fold, so that those of published int4 weights, bfloat16 or float16, are held exactly from
3e-8 to 255.

Four groups lie in 32 words of 16 bits, in the order in which the CPU kernel multiplies them side by side
(`moejax/ops/cpu/int4.h`): of group g, number 8 * k + 2 * t + p is nibble k, from the lowest, of word 8 * t + 2 * g + p.
Of two groups that are left over it is in word 8 * (t // 2) + 4 * g + 2 * (t % 2) + p. Rows are filled up with zeros to
whole pairs of groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from moejax.config.model_config import INT4_GROUP as GROUP

_PAIR = 2 * GROUP
_UNIT = 2.0**-8
"""A stored scale is multiplied with this."""
_WORDS = GROUP // 4
"""Words of a group."""
_SAMPLE = 4


@struct.dataclass
class Int4:
    """A stack of int4 matrices `[..., F, D]`: `numbers [..., F, 16 * ceil(D / 64)]` of uint16, four numbers each, and
    `scale [..., F, 2 * ceil(D / 64)]` of float16. `columns` is D."""

    numbers: Any
    scale: Any
    columns: int = struct.field(pytree_node=False)


def shape_of(shape: tuple[int, ...]) -> Int4:
    """Shapes of a matrix `[..., F, D]`."""
    *lead, columns = shape
    pairs = -(-columns // _PAIR)
    return Int4(
        jax.ShapeDtypeStruct((*lead, 2 * pairs * _WORDS), jnp.uint16),
        jax.ShapeDtypeStruct((*lead, 2 * pairs), jnp.float16),
        columns,
    )


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


def keep(values: Float[np.ndarray, "*F D"]) -> Int4:
    """The int4 weights that are exactly these float32 numbers. Raises ValueError where there are none."""
    found = _exact(_in_groups(values))
    if found is None:
        raise ValueError(
            f"weights of shape {values.shape} are not int4 with a scale of 16 bits for each group of {GROUP} inputs. "
            "Hold them in bfloat16."
        )
    return Int4(_pack(found[0]), found[1], values.shape[-1])


def is_exact(values: Float[np.ndarray, "*F D"]) -> bool:
    """True for numbers that `keep` takes."""
    return _exact(_in_groups(values)) is not None


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
    words = jnp.asarray(weight.numbers)
    *lead, width = words.shape
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)
    nibbles = (words[..., None, :] >> shifts[:, None]) & 15  # [..., k, word]
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
    scale = jnp.asarray(weight.scale).astype(jnp.float32) * _UNIT
    return (numbers * scale[..., None]).reshape(*lead, -1)[..., : weight.columns]


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
