"""Attention of segments over their cached pages and the step's own new keys and values.

One page at a time with a running maximum (arXiv 2205.14135), in page order, so that the sums of a query do
not depend on how long the other contexts are, nor on what was cached and what is new.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.cache import Cache
from moejax.layers import ordered_sum

NEGATIVE = -1e30


def paged_attention(
    q_ZQNH: jax.Array,
    k_RKH: jax.Array,
    v_RKH: jax.Array,
    cache: Cache,
    layer: jax.Array,
    page_table_ZM: jax.Array,
    cached_Z: jax.Array,
    new_base_Z: jax.Array,
    positions_ZQ: jax.Array,
    page_size: int,
) -> jax.Array:
    """Outputs `[Z, Q, N, H]`. A query at position p sees positions 0..p of its segment's sequence:
    those below `cached` in the pages, the others in rows `new_base + position - cached` of k and v."""
    Z, Q, N, H = q_ZQNH.shape
    R, K, _ = k_RKH.shape
    G = N // K
    scale = H**-0.5
    q = (q_ZQNH * scale).reshape(Z, Q, K, G, H).transpose(0, 2, 1, 3, 4).reshape(Z, K, Q * G, H)
    positions = jnp.repeat(positions_ZQ, G, axis=1)
    pages_k, pages_v = (c.reshape(c.shape[0], -1, page_size, K, H) for c in (cache.k, cache.v))

    def page(i, carry):
        maximum, total, out = carry
        ids_Z = page_table_ZM[:, i]
        at_S = i * page_size + jnp.arange(page_size)
        is_new_ZS = at_S >= cached_Z[:, None]
        row_ZS = jnp.clip(new_base_Z[:, None] + at_S - cached_Z[:, None], 0, R - 1)
        k = jnp.where(is_new_ZS[..., None, None], k_RKH[row_ZS], pages_k[layer, ids_Z]).transpose(0, 2, 1, 3)
        v = jnp.where(is_new_ZS[..., None, None], v_RKH[row_ZS], pages_v[layer, ids_Z]).transpose(0, 2, 1, 3)
        seen = (at_S <= positions[..., None])[:, None]
        scores = jnp.where(seen, (q[:, :, :, None, :] * k[:, :, None]).sum(-1), NEGATIVE)
        higher = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(maximum - higher)
        mixed = jnp.einsum("zkqs,zksh->zkqh", weights, v)
        return higher, total * shrink + ordered_sum(weights), out * shrink[..., None] + mixed

    pages = (positions_ZQ.max() + page_size) // page_size
    start = (
        jnp.full((Z, K, Q * G), NEGATIVE),
        jnp.zeros((Z, K, Q * G)),
        jnp.zeros((Z, K, Q * G, H)),
    )
    _, total, out = lax.fori_loop(0, pages, page, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(Z, K, Q, G, H).transpose(0, 2, 1, 3, 4).reshape(Z, Q, N, H).astype(q_ZQNH.dtype)
