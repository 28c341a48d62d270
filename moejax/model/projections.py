"""From hidden rows to the heads of attention and back: projections, biases, norms of queries and keys, rotation.

With latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) all heads share one key and value per position. The
projections out of the latent are applied to the query and to the mixed latent instead of to every cached position
("absorbed"), so that the cache holds nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.config.attention_config import LatentConfig
from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig
from moejax.config.params import Latent, Layer
from moejax.model.indexer import IndexRows, index_rows
from moejax.model.layers import head_dot, rms_norm, rounded, row_dot
from moejax.model.rope import rotate


class QKV(NamedTuple):
    """Queries, keys and values of rows; the cache holds keys and values.

    With latent attention K is 1, and a query meets the value followed by the key: Hq = Hv + Hk. With an indexer the key
    is followed by that of the indexer, whose queries are in `index`.
    """

    q: Float[ArrayLike, "T N Hq"]
    k: Float[ArrayLike, "T K Hk"]
    v: Float[ArrayLike, "T K Hv"]
    index: IndexRows | None = None


def project_qkv(
    h_TD: Float[ArrayLike, "T D"],
    layer: Layer,
    index: Int[ArrayLike, ""],
    positions_T: Int[ArrayLike, " T"],
    cfg: ModelConfig,
) -> QKV:
    """Queries, keys and values of the normed rows of layer `index`, whose own configuration `cfg` is
    (`ModelConfig.of_layer`)."""
    if cfg.latent is not None:
        assert layer.latent is not None
        return _latent_heads(h_TD, layer, layer.latent, positions_T, cfg, cfg.latent)
    T, N, K, H = len(h_TD), cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    width = (N + K) * H
    qkv = row_dot(h_TD, layer.qkv)
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    if cfg.qk_norm == "all":
        q, k, v = jnp.split(qkv, (N * H, width), axis=1)
        q, k = rms_norm(q, layer.query_norm, cfg.norm_eps), rms_norm(k, layer.key_norm, cfg.norm_eps)
        qkv = jnp.concatenate([q, k, v], axis=1)
    if cfg.clip_qkv is not None:
        qkv = jnp.clip(qkv, -cfg.clip_qkv, cfg.clip_qkv)
    qk = qkv[:, :width].reshape(T, N + K, H)
    v = qk[:, N:] if cfg.keys_as_values else qkv[:, width:].reshape(T, K, cfg.value_size)
    if cfg.value_norm:
        v = rms_norm(v, jnp.ones(cfg.value_size), cfg.norm_eps)
    if cfg.value_scale != 1.0:
        v = v * cfg.value_scale
    if cfg.qk_norm == "head" and not cfg.norm_after_rope:
        qk = _norm_heads(qk, layer, cfg)
    qk = _rotate_in_layer(qk, index, positions_T, cfg)
    if cfg.norm_after_rope:
        qk = _norm_heads(qk, layer, cfg)
    return QKV(qk[:, :N], qk[:, N:], v)


def _norm_heads(qk_TNH: Float[ArrayLike, "T NK H"], layer: Layer, cfg: ModelConfig) -> Float[ArrayLike, "T NK H"]:
    """Queries and keys, each head normed by itself."""
    q = rms_norm(qk_TNH[:, : cfg.n_heads], layer.query_norm, cfg.norm_eps)
    k = rms_norm(qk_TNH[:, cfg.n_heads :], layer.key_norm, cfg.norm_eps)
    return jnp.concatenate([q, k], axis=1)


def _rotate_in_layer(
    qk_TNH: Float[ArrayLike, "T NK H"], index: Int[ArrayLike, ""], positions_T: Int[ArrayLike, " T"], cfg: ModelConfig
) -> Float[ArrayLike, "T NK H"]:
    """Queries and keys rotated by position, unless the layer has no rotary embedding."""
    rotated = rotate(qk_TNH, positions_T, cfg)
    if cfg.qk_norm == "l2":
        rotated = rms_norm(rotated, jnp.ones(cfg.d_head), cfg.norm_eps)
    rotated = _grow(rotated, positions_T, cfg, is_rotated=True)
    if not cfg.unrotated_layers:
        return rotated
    is_rotated_L = jnp.array([i not in cfg.unrotated_layers for i in range(cfg.n_layers)])
    return jnp.where(is_rotated_L[index], rotated, _grow(qk_TNH, positions_T, cfg, is_rotated=False))


def _grow(
    qk_TNH: Float[ArrayLike, "T NK H"], positions_T: Int[ArrayLike, " T"], cfg: ModelConfig, *, is_rotated: bool
) -> Float[ArrayLike, "T NK H"]:
    """Queries multiplied as `cfg.score_growth` says for a layer with or without rotary embedding, and keys, which may
    follow them, as they are."""
    growth = cfg.score_growth
    if growth is None or (is_rotated and not growth.all_layers):
        return qk_TNH
    steps_T = jnp.floor((positions_T.astype(jnp.float32) + growth.first) / growth.every)
    factor_T11 = (1 + growth.scale * jnp.log1p(steps_T))[:, None, None]
    return jnp.concatenate([qk_TNH[:, : cfg.n_heads] * factor_T11, qk_TNH[:, cfg.n_heads :]], axis=1)


def project_heads(
    mixed_TNH: Float[ArrayLike, "T N H"], h_TD: Float[ArrayLike, "T D"], layer: Layer, cfg: ModelConfig
) -> Float[ArrayLike, "T D"]:
    """The output of these heads from their mixed values and the layer's normed rows `h`, without what all heads have in
    common (`finish_attention`)."""
    if layer.latent is not None:
        mixed_TNH = head_dot(mixed_TNH, layer.latent.value_up)
    if layer.attention_gate is not None:
        function = jax.nn.sigmoid if cfg.gate_function == "sigmoid" else jax.nn.softplus
        gates_TG = function(row_dot(h_TD, layer.attention_gate))
        mixed_TNH = mixed_TNH * gates_TG.reshape(*mixed_TNH.shape[:2], -1)
    return row_dot(mixed_TNH.reshape(len(mixed_TNH), -1), layer.out)


def finish_attention(out_TD: Float[ArrayLike, "T D"], layer: Layer, cfg: ModelConfig) -> Float[ArrayLike, "T D"]:
    """The output of all heads with the bias of the output projection, normed if the model does so."""
    if layer.out_bias is not None:
        out_TD = out_TD + layer.out_bias
    if layer.attention_post_norm is None:
        return out_TD
    return rounded(rms_norm(out_TD, layer.attention_post_norm, cfg.norm_eps))


def score_scale(cfg: ModelConfig) -> float:
    """Factor of the scores before the softmax."""
    return cfg.d_head**-0.5 if cfg.attention_scale is None else cfg.attention_scale


def _latent_heads(
    h_TD: Float[ArrayLike, "T D"],
    layer: Layer,
    weights: Latent,
    positions_T: Int[ArrayLike, " T"],
    cfg: ModelConfig,
    latent: LatentConfig,
) -> QKV:
    T, N, C = len(h_TD), cfg.n_heads, latent.d_latent
    low = h_TD
    if weights.query_down is not None:
        low = rms_norm(row_dot(h_TD, weights.query_down), weights.query_norm, latent.norm_eps)
    query = row_dot(low, weights.query).reshape(T, N, cfg.d_head)
    down = row_dot(h_TD, weights.down)
    value = rms_norm(down[:, :C], weights.norm, latent.norm_eps)
    key = down[:, None, C:]
    rotated = query[..., latent.d_plain :]
    if not cfg.unrotated_layers:
        key, rotated = rotate(key, positions_T, cfg), rotate(rotated, positions_T, cfg)
    plain = head_dot(query[..., : latent.d_plain], weights.key_up)
    q = _grow(jnp.concatenate([plain, rotated], axis=-1), positions_T, cfg, is_rotated=True)
    if cfg.indexer is None:
        return QKV(q, key, value[:, None])
    assert layer.indexer is not None
    index = index_rows(h_TD, low, layer.indexer, positions_T, cfg, cfg.indexer)
    return QKV(q, jnp.concatenate([key, index.key[:, None]], axis=-1), value[:, None], index)
