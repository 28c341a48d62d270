"""From hidden rows to the heads of attention and back: projections, biases, norms of queries and keys, rotation.

With latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) all heads share one key and value per position. The
projections out of the latent are applied to the query and to the mixed latent instead of to every cached position
("absorbed"), so that the cache holds nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import LatentConfig, ModelConfig
from moejax.layers import head_dot, rms_norm, row_dot
from moejax.params import Latent, Layer
from moejax.rope import rotate


class Heads(NamedTuple):
    """Queries `[T, N, Hq]`, keys `[T, K, Hk]` and values `[T, K, Hv]` of rows: what is kept in the cache is keys and
    values. With latent attention K is 1, and a query meets the value followed by the key: Hq = Hv + Hk."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def make_heads(h_TD: jax.Array, layer: Layer, positions_T: jax.Array, cfg: ModelConfig) -> Heads:
    """Queries, keys and values of normed rows."""
    if cfg.latent is not None:
        return _latent_heads(h_TD, layer.latent, positions_T, cfg, cfg.latent)
    T, N, K, H = len(h_TD), cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    qkv = row_dot(h_TD, layer.qkv)
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    if cfg.qk_norm == "all":
        q, k, v = jnp.split(qkv, (N * H, (N + K) * H), axis=1)
        q, k = rms_norm(q, layer.query_norm, cfg.norm_eps), rms_norm(k, layer.key_norm, cfg.norm_eps)
        qkv = jnp.concatenate([q, k, v], axis=1)
    if cfg.clip_qkv is not None:
        qkv = jnp.clip(qkv, -cfg.clip_qkv, cfg.clip_qkv)
    qkv = qkv.reshape(T, N + 2 * K, H)
    if cfg.qk_norm == "head":
        q = rms_norm(qkv[:, :N], layer.query_norm, cfg.norm_eps)
        k = rms_norm(qkv[:, N : N + K], layer.key_norm, cfg.norm_eps)
        qkv = jnp.concatenate([q, k, qkv[:, N + K :]], axis=1)
    qk = rotate(qkv[:, : N + K], positions_T, cfg)
    return Heads(qk[:, :N], qk[:, N:], qkv[:, N + K :])


def join_heads(mixed_TNH: jax.Array, layer: Layer, cfg: ModelConfig) -> jax.Array:
    """What attention adds to the rows `[T, D]`, from the mixed values `[T, N, Hv]`."""
    return biased(some_heads(mixed_TNH, layer, cfg), layer)


def some_heads(mixed_TNH: jax.Array, layer: Layer, cfg: ModelConfig) -> jax.Array:
    """What these heads add to the rows `[T, D]`, without the bias that all heads have in common."""
    if cfg.latent is not None:
        mixed_TNH = head_dot(mixed_TNH, layer.latent.value_up)
    return row_dot(mixed_TNH.reshape(len(mixed_TNH), -1), layer.out)


def biased(out_TD: jax.Array, layer: Layer) -> jax.Array:
    """What all heads add to the rows, with its bias."""
    return out_TD if layer.out_bias is None else out_TD + layer.out_bias


def score_scale(cfg: ModelConfig) -> float:
    """What scores are multiplied by before the softmax."""
    return cfg.d_head**-0.5 if cfg.attention_scale is None else cfg.attention_scale


def _latent_heads(
    h_TD: jax.Array, weights: Latent, positions_T: jax.Array, cfg: ModelConfig, latent: LatentConfig
) -> Heads:
    T, N, C = len(h_TD), cfg.n_heads, latent.d_latent
    low = h_TD
    if weights.query_down is not None:
        low = rms_norm(row_dot(h_TD, weights.query_down), weights.query_norm, latent.norm_eps)
    query = row_dot(low, weights.query).reshape(T, N, cfg.d_head)
    down = row_dot(h_TD, weights.down)
    value = rms_norm(down[:, :C], weights.norm, latent.norm_eps)
    key = rotate(down[:, None, C:], positions_T, cfg)
    plain = head_dot(query[..., : latent.d_plain], weights.key_up)
    rotated = rotate(query[..., latent.d_plain :], positions_T, cfg)
    return Heads(jnp.concatenate([plain, rotated], axis=-1), key, value[:, None])
