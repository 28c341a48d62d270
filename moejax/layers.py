"""The parts of a decoder layer that do not know about meshes, pages or batches.

Rows are independent: the result for a row does not depend, in any bit, on how many rows there are or
which they are. That makes a stream the same alone, in a batch, and after a failure. Plain dots and sums do
not have this property on XLA:CPU (docs/decisions/0001), `row_dot` and `ordered_sum` do.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_LANES = 32
"""Partial sums kept side by side in `ordered_sum`."""


def row_dot(x_TD: jax.Array, w_FD: jax.Array) -> jax.Array:
    """`x @ w.T` `[T, F]` for a weight `[out, in]`, each row summed in the same order whatever T is.

    Weights are stored `[out, in]` for this: with the contracted axis last, XLA:CPU keeps the order for any two
    rows or more; a single row would take another path and is doubled.
    """
    if x_TD.shape[0] == 1:
        return row_dot(jnp.concatenate([x_TD, x_TD]), w_FD)[:1]
    return lax.dot_general(x_TD, w_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x_TD.dtype)


def ordered_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis in an order that depends on its length alone (XLA's own does not: see row_dot)."""
    size = x.shape[-1]
    if size > _LANES and size % _LANES == 0:
        return ordered_sum(functools.reduce(jnp.add, jnp.split(x, size // _LANES, axis=-1)))
    odd = []
    while size > 1:
        if size % 2:
            odd.append(x[..., size - 1])
        size //= 2
        x = x[..., :size] + x[..., size : 2 * size]
    return functools.reduce(jnp.add, odd, x[..., 0])


def rms_norm(x_TD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm (arXiv 1910.07467), in float32."""
    x32 = x_TD.astype(jnp.float32)
    variance = ordered_sum(x32 * x32)[..., None] / x_TD.shape[-1]
    return (x32 * lax.rsqrt(variance + eps)).astype(x_TD.dtype) * scale_D


def swiglu(x_TD: jax.Array, gate_up_2FD: jax.Array, down_DF: jax.Array) -> jax.Array:
    """SwiGLU feed-forward (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""
    hidden = row_dot(x_TD, gate_up_2FD)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return row_dot(jax.nn.silu(gate) * up, down_DF)


def rope(x_TNH: jax.Array, positions_T: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other as in Llama's own code."""
    half = x_TNH.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_T.astype(jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
