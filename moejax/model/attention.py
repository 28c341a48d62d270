"""Attention of segments over their cached pages and the new keys and values of the step.

One page at a time with a running maximum (arXiv 2205.14135), in page order. So the sums of a query do not depend on the
length of other contexts, nor on which positions were cached and which are new.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.axes import MASKED_SCORE, ArrayLike
from moejax.config.kv_cache import from_cache_format, numbers_of
from moejax.model.indexer import best_positions, index_scores
from moejax.model.layers import ordered_sum
from moejax.ops import cpu


def paged_attention(inputs: AttentionInputs) -> Float[jax.Array, "Z Q N Hv"]:
    """The mixed values of every query: softmax attention over its segment's positions, zeros for queries of padding.

    Chosen where the program is lowered: the kernel of the platform if it covers these inputs, else the reference.
    """
    if inputs.is_plain and cpu.active():
        out = cpu.paged_attention(inputs)
    elif inputs.is_plain:
        out = _by_platform(inputs)
    else:
        out = paged_attention_reference(inputs)
    return out.astype(inputs.q.dtype)


def _by_platform(inputs: AttentionInputs) -> jax.Array:
    from moejax.ops.pallas import gpu, tpu  # not at import: a rank on a CPU does without and starts 0.25 s sooner

    kernels = {name: each for name, each in (("cuda", gpu), ("tpu", tpu)) if each.supports_attention(inputs)}
    return lax.platform_dependent(
        inputs,
        default=paged_attention_reference,
        **{name: each.paged_attention for name, each in kernels.items()},
    )


def paged_attention_reference(inputs: AttentionInputs) -> Float[jax.Array, "Z Q N Hv"]:
    """`paged_attention` by XLA, for all inputs.

    One page of all segments at a time. Cost grows with the longest sequence of the batch, its result does not. XLA:CPU
    would add up in another order for a single segment, which is doubled.
    """
    if inputs.q.shape[0] == 1:
        return paged_attention_reference(_doubled(inputs))[:1]
    q_ZQNH, page_size = inputs.q, inputs.page_size
    positions_ZQ, window, chunk = inputs.positions, inputs.window, inputs.chunk
    Z, Q, N, H = q_ZQNH.shape
    K = inputs.kv_heads
    G, Hv = N // K, inputs.d_value or numbers_of(inputs.new.v).shape[-1] // K
    q = (q_ZQNH * inputs.scale).reshape(Z, Q, K, G, H).transpose(0, 2, 1, 3, 4).reshape(Z, K, Q * G, H)
    positions = jnp.repeat(positions_ZQ, G, axis=1)

    pages = (positions_ZQ.max() + page_size) // page_size
    chosen_ZQS = _chosen(inputs, pages)

    def page(i, carry):
        maximum, total, out = carry
        at_S = i * page_size + jnp.arange(page_size)
        k, v = (each.transpose(0, 2, 1, 3) for each in _entries(inputs, i))
        if inputs.latent:
            k = jnp.concatenate([v, k], axis=-1)[..., :H]
        seen = at_S <= positions[..., None]
        if window is not None:
            seen &= at_S > positions[..., None] - window
        if chunk is not None:
            seen &= at_S >= (positions // chunk * chunk)[..., None]
        if chosen_ZQS is not None:
            here_ZQS = lax.dynamic_slice_in_dim(chosen_ZQS, i * page_size, page_size, axis=2)
            seen &= jnp.repeat(here_ZQS, G, axis=1)
        seen = seen[:, None]
        scores = jnp.where(seen, (q[:, :, :, None, :] * k[:, :, None]).sum(-1), MASKED_SCORE)
        higher = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(maximum - higher)
        mixed = _mix(weights, v)
        return higher, total * shrink + ordered_sum(weights), out * shrink[..., None] + mixed

    first = 0
    nearest = jnp.where(positions_ZQ >= 0, positions_ZQ, page_size * pages).min()
    if window is not None:
        first = jnp.maximum(nearest - window + 1, 0) // page_size
    if chunk is not None:
        first = nearest // chunk * chunk // page_size
    start = (
        jnp.full((Z, K, Q * G), MASKED_SCORE),
        jnp.zeros((Z, K, Q * G)),
        jnp.zeros((Z, K, Q * G, Hv)),
    )
    if inputs.sinks is not None:
        sinks = jnp.tile(inputs.sinks.reshape(K, 1, G), (Z, 1, Q, 1)).reshape(Z, K, Q * G)
        start = (sinks.astype(jnp.float32), jnp.ones((Z, K, Q * G)), start[2])
    _, total, out = lax.fori_loop(first, pages, page, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(Z, K, Q, G, Hv).transpose(0, 2, 1, 3, 4).reshape(Z, Q, N, Hv)


def _doubled(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs with each segment twice."""
    by_segment = ("q", "page_table", "cached", "new_base", "positions")
    twice = {name: jnp.concatenate([getattr(inputs, name)] * 2) for name in by_segment}
    index = inputs.index
    if index is not None:
        index = dataclasses.replace(
            index, q=jnp.concatenate([index.q] * 2), weights=jnp.concatenate([index.weights] * 2)
        )
    return dataclasses.replace(inputs, index=index, **twice)


def _entries(inputs: AttentionInputs, i: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[Z, page_size, K, H]` of page i of all sequences, in float32: cached ones, and new ones beyond
    them."""
    page_size, R, K = inputs.page_size, inputs.new.entries, inputs.kv_heads
    at_S = i * page_size + jnp.arange(page_size)
    is_new_ZS1 = (at_S >= inputs.cached[:, None])[..., None]
    row_ZS = jnp.clip(inputs.new_base[:, None] + at_S - inputs.cached[:, None], 0, R - 1)
    # Entries are gathered first and reshaped into heads afterwards: when a whole cache is reshaped into heads, XLA
    # copies all of it into another layout on every layer when it compiles for a TPU.
    entry_ZS = inputs.page_table[:, i][:, None] * page_size + jnp.arange(page_size)
    here = jax.tree.map(
        lambda new, cached: jnp.where(is_new_ZS1, new[row_ZS], cached[inputs.layer, entry_ZS]),
        (inputs.new.k, inputs.new.v),
        (inputs.cache.k, inputs.cache.v),
    )
    k, v = map(from_cache_format, here)
    if inputs.d_value is not None:
        k, v = k[..., : K * inputs.q.shape[-1]], v[..., : K * inputs.d_value]
    return k.reshape(*row_ZS.shape, K, -1), v.reshape(*row_ZS.shape, K, -1)


def _chosen(inputs: AttentionInputs, pages: jax.Array) -> Bool[jax.Array, "Z Q S"] | None:
    """True for the positions of `pages` pages that the indexer chooses for each query; None where all are seen."""
    index, page_size = inputs.index, inputs.page_size
    Z, Q = inputs.positions.shape
    S = inputs.page_table.shape[1] * page_size
    if index is None or index.chosen >= S:
        return None

    def page(i, scores_ZQS):
        keys_ZSH = _entries(inputs, i)[0][:, :, 0, -index.q.shape[-1] :]
        scores = index_scores(index.q, index.weights, keys_ZSH)
        return lax.dynamic_update_slice_in_dim(scores_ZQS, scores, i * page_size, axis=2)

    scores_ZQS = lax.fori_loop(0, pages, page, jnp.full((Z, Q, S), -jnp.inf, jnp.float32))
    return best_positions(scores_ZQS, inputs.positions, index.chosen)


def _mix(weights_ZKQS: jax.Array, v_ZKSH: jax.Array) -> jax.Array:
    """`weights @ v`. On XLA:CPU the order of a row's sum is independent of other rows only for widths that are
    multiples of 16 (measured; docs/decisions/0001)."""
    if v_ZKSH.shape[-1] % 16 == 0:
        return jnp.einsum("zkqs,zksh->zkqh", weights_ZKQS, v_ZKSH)
    return ordered_sum(weights_ZKQS[..., None, :] * v_ZKSH[:, :, None].swapaxes(-1, -2))
