"""Attention of segments over their cached pages and the new keys and values of the step.

One page at a time with a running maximum (arXiv 2205.14135), in page order. So the sums of a query do not depend on the
length of other contexts, nor on which positions were cached and which are new.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.axes import MASKED_SCORE
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

    One page of all segments at a time. Cost grows with the longest sequence of the batch, its result does not.
    """
    q_ZQNH, k_RKH, v_RKH, cache, page_size = inputs.q, inputs.k, inputs.v, inputs.cache, inputs.page_size
    positions_ZQ, window, chunk = inputs.positions, inputs.window, inputs.chunk
    Z, Q, N, H = q_ZQNH.shape
    R, K, _ = k_RKH.shape
    Hv = v_RKH.shape[-1]
    G = N // K
    q = (q_ZQNH * inputs.scale).reshape(Z, Q, K, G, H).transpose(0, 2, 1, 3, 4).reshape(Z, K, Q * G, H)
    positions = jnp.repeat(positions_ZQ, G, axis=1)

    def page(i, carry):
        maximum, total, out = carry
        ids_Z = inputs.page_table[:, i]
        at_S = i * page_size + jnp.arange(page_size)
        is_new_ZS = at_S >= inputs.cached[:, None]
        row_ZS = jnp.clip(inputs.new_base[:, None] + at_S - inputs.cached[:, None], 0, R - 1)
        # Entries are gathered first and reshaped into heads afterwards: when a whole cache is reshaped into heads, XLA
        # copies all of it into another layout on every layer when it compiles for a TPU.
        entry_ZS = ids_Z[:, None] * page_size + jnp.arange(page_size)
        old_k, old_v = (each[inputs.layer, entry_ZS].reshape(Z, page_size, K, -1) for each in (cache.k, cache.v))
        k = jnp.where(is_new_ZS[..., None, None], k_RKH[row_ZS], old_k).transpose(0, 2, 1, 3)
        v = jnp.where(is_new_ZS[..., None, None], v_RKH[row_ZS], old_v).transpose(0, 2, 1, 3)
        if inputs.latent:
            k = jnp.concatenate([v, k], axis=-1)
        seen = at_S <= positions[..., None]
        if window is not None:
            seen &= at_S > positions[..., None] - window
        if chunk is not None:
            seen &= at_S >= (positions // chunk * chunk)[..., None]
        seen = seen[:, None]
        scores = jnp.where(seen, (q[:, :, :, None, :] * k[:, :, None]).sum(-1), MASKED_SCORE)
        higher = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(maximum - higher)
        mixed = _mix(weights, v)
        return higher, total * shrink + ordered_sum(weights), out * shrink[..., None] + mixed

    pages = (positions_ZQ.max() + page_size) // page_size
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


def _mix(weights_ZKQS: jax.Array, v_ZKSH: jax.Array) -> jax.Array:
    """`weights @ v`. On XLA:CPU the order of a row's sum is independent of other rows only for widths that are
    multiples of 16 (measured; docs/decisions/0001)."""
    if v_ZKSH.shape[-1] % 16 == 0:
        return jnp.einsum("zkqs,zksh->zkqh", weights_ZKQS, v_ZKSH)
    return ordered_sum(weights_ZKQS[..., None, :] * v_ZKSH[:, :, None].swapaxes(-1, -2))
