"""The head, and logits processing: penalties, biases, and the tokens that a grammar allows.

The front sends a few numbers per row. `dense_adjustments` makes arrays of them on the rank's host, `adjust_logits`
applies them on the device. Rows without adjustments keep every bit of their logits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, UInt32

from moejax.config.axes import ArrayLike
from moejax.config.params import Head
from moejax.model.layers import row_dot

MASK_BITS = 32
"""Tokens of one word of a bit mask: token t is bit t % 32 of word t // 32."""


@struct.dataclass
class LogitsAdjustments:
    """Adjustments of Z rows over V tokens. Leaves are arrays or shapes; W = ceil(V / 32)."""

    add: Any
    """Added to the logits, float32 `[Z, V]`."""
    seen: Any
    """Bit mask of the tokens that the repetition penalty applies to, uint32 `[Z, W]`."""
    allowed: Any
    """Bit mask of the tokens that can be sampled, uint32 `[Z, W]`."""
    repetition: Any
    """Repetition penalty, float32 `[Z]`; 1 for none."""


class RowAdjustment(NamedTuple):
    """Adjustments of one row: `add[i]` for the logit of `tokens[i]`, the tokens `seen` that the penalty `repetition`
    makes less likely, and the bit mask `allowed`, empty for all tokens."""

    tokens: np.ndarray
    add: np.ndarray
    seen: np.ndarray
    repetition: float
    allowed: np.ndarray


def mask_words(vocab_size: int) -> int:
    """Words of a bit mask over the vocabulary."""
    return -(-vocab_size // MASK_BITS)


def dense_adjustments(rows: Mapping[int, RowAdjustment], segments: int, vocab_size: int) -> LogitsAdjustments:
    """The arrays of a step with so many segments, neutral for segments that `rows` lacks."""
    width = mask_words(vocab_size)
    add = np.zeros((segments, vocab_size), np.float32)
    seen = np.zeros((segments, width), np.uint32)
    allowed = np.full((segments, width), 0xFFFFFFFF, np.uint32)
    repetition = np.ones(segments, np.float32)
    for segment, row in rows.items():
        add[segment, row.tokens] = row.add
        np.bitwise_or.at(seen[segment], row.seen // MASK_BITS, np.uint32(1) << (row.seen % MASK_BITS).astype(np.uint32))
        repetition[segment] = row.repetition
        if row.allowed.size:
            allowed[segment, : row.allowed.size] = row.allowed[:width]
            allowed[segment, row.allowed.size :] = 0
    return LogitsAdjustments(add=add, seen=seen, allowed=allowed, repetition=repetition)


def head_logits(head: Head, hidden_TD: Float[ArrayLike, "T D"]) -> Float[ArrayLike, "T V"]:
    """Logits of hidden rows, after the last norm."""
    logits_TV = row_dot(hidden_TD, head.weight)
    if head.bias is not None:
        logits_TV = logits_TV + head.bias
    return logits_TV if head.cap is None else head.cap * jnp.tanh(logits_TV / head.cap)


def adjust_logits(logits_ZV: Float[ArrayLike, "Z V"], adjustments: LogitsAdjustments) -> Float[ArrayLike, "Z V"]:
    """Logits after the repetition penalty (divided when positive, multiplied when negative; arXiv 1909.05858), then the
    additions, then -inf for tokens that are not allowed."""
    size = logits_ZV.shape[-1]
    factor_Z1 = adjustments.repetition[:, None]
    penalized_ZV = jnp.where(logits_ZV > 0, logits_ZV / factor_Z1, logits_ZV * factor_Z1)
    adjusted_ZV = jnp.where(_bits(adjustments.seen, size), penalized_ZV, logits_ZV) + adjustments.add
    return jnp.where(_bits(adjustments.allowed, size), adjusted_ZV, -jnp.inf)


def _bits(mask_ZW: UInt32[ArrayLike, "Z W"], size: int) -> Bool[ArrayLike, "Z V"]:
    bits = (mask_ZW[:, :, None] >> jnp.arange(MASK_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(mask_ZW.shape[0], -1)[:, :size] == 1
