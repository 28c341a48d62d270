"""The parts of a decoder layer that do not know about meshes, pages or batches.

Rows are independent: the result for a row does not depend, in any bit, on how many rows there are or
which they are. That is what makes a stream the same alone, in a batch, and after a failure. A plain dot
does not have this property on XLA:CPU, where the order of summation over the contracted axis changes with
the number of rows; within 2..32 rows it does not change, so `row_dot` never leaves that range.
"""

import jax
import jax.numpy as jnp
from jax import lax

ROW_TILE = 32
"""Most rows a single dot may have for its sums to keep their order (measured, see docs/decisions)."""


def row_dot(x: jax.Array, w: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`x [T, D] @ w [D, F]` (or `w [F, D]` when transposed), each row summed in the same order for any T."""
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def dot(rows: jax.Array) -> jax.Array:
        return lax.dot_general(rows, w, contract, preferred_element_type=jnp.float32).astype(x.dtype)

    T, D = x.shape
    if T == 1:
        return dot(jnp.concatenate([x, x]))[:1]
    lead = T % ROW_TILE
    if lead == 1:
        raise ValueError(f"{T} rows leave a single row after tiles of {ROW_TILE}; pad the batch to an even number")
    parts = [dot(x[:lead])] if lead else []
    tiles = T // ROW_TILE
    if tiles == 1:
        parts.append(dot(x[lead:]))
    elif tiles:
        out = lax.map(dot, x[lead:].reshape(tiles, ROW_TILE, D))
        parts.append(out.reshape(tiles * ROW_TILE, -1))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def rms_norm(x_TD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm (arXiv 1910.07467), in float32."""
    x32 = x_TD.astype(jnp.float32)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(variance + eps)).astype(x_TD.dtype) * scale_D


def swiglu(x_TD: jax.Array, gate_up_D2F: jax.Array, down_FD: jax.Array) -> jax.Array:
    """SwiGLU feed-forward (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""
    hidden = row_dot(x_TD, gate_up_D2F)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return row_dot(jax.nn.silu(gate) * up, down_FD)


def rope(x_TNH: jax.Array, positions_T: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other as in Llama's own code."""
    half = x_TNH.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_T.astype(jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
