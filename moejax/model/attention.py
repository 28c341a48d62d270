"""Attention of segments over their cached pages and the step's own new keys and values.

One page at a time with a running maximum (arXiv 2205.14135), in page order, so that the sums of a query do
not depend on how long the other contexts are, nor on what was cached and what is new.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax import kernels
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
    *,
    scale: float,
    window: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    latent: bool = False,
) -> jax.Array:
    """Outputs `[Z, Q, N, Hv]`. A query at position p sees positions 0..p of its segment's sequence, or the last
    `window` of them: those below `cached` in the pages, the others in rows `new_base + position - cached` of k and v.

    Scores are multiplied by `scale`. `sinks_N` is a score per head that takes its share of the weight and adds nothing
    (arXiv 2309.17453). If `latent`, queries meet the value followed by the key (`moejax.heads`).
    """
    arguments = (q_ZQNH, k_RKH, v_RKH, cache, layer, page_table_ZM, cached_Z, new_base_Z, positions_ZQ)
    plain = window is None and sinks_N is None and not latent
    if plain and kernels.active():
        out = kernels.paged_attention(*arguments, page_size, scale=scale)
    elif plain:
        out = _by_platform(*arguments, page_size=page_size, scale=scale)
    else:
        special = {"window": window, "sinks_N": sinks_N, "latent": latent}
        out = paged_attention_reference(*arguments, page_size, scale=scale, **special)
    return out.astype(q_ZQNH.dtype)


def _by_platform(*arguments: Any, page_size: int, scale: float) -> jax.Array:
    """By the kernel of the platform that the program is lowered for, if it has one that covers these sizes."""
    from moejax.pallas import gpu, tpu  # a CPU's rank can do without: a quarter of a second of its start

    q, cache = arguments[0], arguments[3]
    covers = {"cuda": gpu.takes_attention(q.shape[-1], page_size), "tpu": tpu.takes_attention(cache, page_size)}
    kernel = {"cuda": gpu.paged_attention, "tpu": tpu.paged_attention}
    ways = {
        name: functools.partial(kernel[name], page_size=page_size, scale=scale) for name, does in covers.items() if does
    }
    reference = functools.partial(paged_attention_reference, page_size=page_size, scale=scale)
    return lax.platform_dependent(*arguments, default=reference, **ways)


def paged_attention_reference(
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
    *,
    scale: float,
    window: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    latent: bool = False,
) -> jax.Array:
    """`paged_attention` by XLA."""
    Z, Q, N, H = q_ZQNH.shape
    R, K, _ = k_RKH.shape
    Hv = v_RKH.shape[-1]
    G = N // K
    q = (q_ZQNH * scale).reshape(Z, Q, K, G, H).transpose(0, 2, 1, 3, 4).reshape(Z, K, Q * G, H)
    positions = jnp.repeat(positions_ZQ, G, axis=1)

    def page(i, carry):
        maximum, total, out = carry
        ids_Z = page_table_ZM[:, i]
        at_S = i * page_size + jnp.arange(page_size)
        is_new_ZS = at_S >= cached_Z[:, None]
        row_ZS = jnp.clip(new_base_Z[:, None] + at_S - cached_Z[:, None], 0, R - 1)
        # Entries are picked as they lie and shaped into heads afterwards: a cache shaped into heads as a whole is laid
        # out anew by XLA for a TPU, all of it, on every layer.
        entry_ZS = ids_Z[:, None] * page_size + jnp.arange(page_size)
        old_k, old_v = (each[layer, entry_ZS].reshape(Z, page_size, K, -1) for each in (cache.k, cache.v))
        k = jnp.where(is_new_ZS[..., None, None], k_RKH[row_ZS], old_k).transpose(0, 2, 1, 3)
        v = jnp.where(is_new_ZS[..., None, None], v_RKH[row_ZS], old_v).transpose(0, 2, 1, 3)
        if latent:
            k = jnp.concatenate([v, k], axis=-1)
        seen = at_S <= positions[..., None]
        if window is not None:
            seen &= at_S > positions[..., None] - window
        seen = seen[:, None]
        scores = jnp.where(seen, (q[:, :, :, None, :] * k[:, :, None]).sum(-1), NEGATIVE)
        higher = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(maximum - higher)
        mixed = _mix(weights, v)
        return higher, total * shrink + ordered_sum(weights), out * shrink[..., None] + mixed

    pages = (positions_ZQ.max() + page_size) // page_size
    first = 0
    if window is not None:
        nearest = jnp.where(positions_ZQ >= 0, positions_ZQ, page_size * pages).min()
        first = jnp.maximum(nearest - window + 1, 0) // page_size
    start = (
        jnp.full((Z, K, Q * G), NEGATIVE),
        jnp.zeros((Z, K, Q * G)),
        jnp.zeros((Z, K, Q * G, Hv)),
    )
    if sinks_N is not None:
        sinks = jnp.tile(sinks_N.reshape(K, 1, G), (Z, 1, Q, 1)).reshape(Z, K, Q * G)
        start = (sinks.astype(jnp.float32), jnp.ones((Z, K, Q * G)), start[2])
    _, total, out = lax.fori_loop(first, pages, page, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(Z, K, Q, G, Hv).transpose(0, 2, 1, 3, 4).reshape(Z, Q, N, Hv)


def _mix(weights_ZKQS: jax.Array, v_ZKSH: jax.Array) -> jax.Array:
    """`weights @ v`. XLA:CPU's dot sums each row in the same order whatever the others are only for widths that are
    whole vectors of 16 (measured; docs/decisions/0001)."""
    if v_ZKSH.shape[-1] % 16 == 0:
        return jnp.einsum("zkqs,zksh->zkqh", weights_ZKQS, v_ZKSH)
    return ordered_sum(weights_ZKQS[..., None, :] * v_ZKSH[:, :, None].swapaxes(-1, -2))
