"""What bends a row's choice besides temperature and filters: penalties, biases and the tokens a grammar allows.

The front says it in few numbers per row; `dense` makes arrays of them on the host of the rank, `shape_logits` applies
them on the device. Rows that nobody bends keep every bit of their logits.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

WORD = 32
"""Tokens of one word of a bit mask: token t is bit t % 32 of word t // 32."""


@struct.dataclass
class Shaping:
    """Of Z rows and V tokens: `add [Z, V]` float32, `seen` and `allowed [Z, ceil(V / 32)]` uint32 bit masks, and
    `repetition [Z]` float32. Leaves are arrays or shapes."""

    add: jax.Array
    seen: jax.Array
    allowed: jax.Array
    repetition: jax.Array


class RowShape(NamedTuple):
    """One row's: `add[i]` for the logit of `tokens[i]`, the tokens `seen` that `repetition` makes less likely, and the
    bit mask `allowed`, empty for all tokens."""

    tokens: np.ndarray
    add: np.ndarray
    seen: np.ndarray
    repetition: float
    allowed: np.ndarray


def words(vocab_size: int) -> int:
    """Words of a bit mask over the vocabulary."""
    return -(-vocab_size // WORD)


def dense(rows: Mapping[int, RowShape], segments: int, vocab_size: int) -> Shaping:
    """The arrays of a step of so many segments, neutral where `rows` has none."""
    width = words(vocab_size)
    add = np.zeros((segments, vocab_size), np.float32)
    seen = np.zeros((segments, width), np.uint32)
    allowed = np.full((segments, width), 0xFFFFFFFF, np.uint32)
    repetition = np.ones(segments, np.float32)
    for segment, row in rows.items():
        add[segment, row.tokens] = row.add
        np.bitwise_or.at(seen[segment], row.seen // WORD, np.uint32(1) << (row.seen % WORD).astype(np.uint32))
        repetition[segment] = row.repetition
        if row.allowed.size:
            allowed[segment, : row.allowed.size] = row.allowed[:width]
            allowed[segment, row.allowed.size :] = 0
    return Shaping(add=add, seen=seen, allowed=allowed, repetition=repetition)


def shape_logits(logits_ZV: jax.Array, shaping: Shaping) -> jax.Array:
    """Logits after the repetition penalty of what was seen (divided when positive, multiplied when negative;
    arXiv 1909.05858), then what is added, then -inf for what is not allowed."""
    size = logits_ZV.shape[-1]
    factor = shaping.repetition[:, None]
    punished = jnp.where(logits_ZV > 0, logits_ZV / factor, logits_ZV * factor)
    bent = jnp.where(_bits(shaping.seen, size), punished, logits_ZV) + shaping.add
    return jnp.where(_bits(shaping.allowed, size), bent, -jnp.inf)


def _bits(mask_ZW: jax.Array, size: int) -> jax.Array:
    bits = (mask_ZW[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(mask_ZW.shape[0], -1)[:, :size] == 1
