"""The model once more, dense, slow and in float64 NumPy, sharing no code with `moejax`: what its answers should be."""

from collections.abc import Collection

import numpy as np

from moejax.config import ModelConfig
from moejax.params import FeedForward, Layer, MoE, Params


def forward(params: Params, cfg: ModelConfig, tokens: list[int], *, masked: Collection[int] = ()) -> np.ndarray:
    """Logits [T, V] of the next token at each position, with `masked` experts out of every MoE layer."""
    x = _f64(params.embed)[np.array(tokens)]
    for (pattern, repeats), segment in zip(cfg.segments, params.segments, strict=True):
        for repeat in range(repeats):
            for j, _ in enumerate(pattern):
                x = _layer(x, segment[j], repeat, cfg, masked)
    head = params.embed if params.head is None else params.head
    return _norm(x, params.final_norm, cfg.norm_eps) @ _f64(head).T


def _layer(x: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig, masked: Collection[int]) -> np.ndarray:
    x = x + _attention(_norm(x, layer.attention_norm[repeat], cfg.norm_eps), layer, repeat, cfg)
    h = _norm(x, layer.ffn_norm[repeat], cfg.norm_eps)
    if layer.moe is None:
        return x + _feed_forward(h, layer.ffn, (repeat,))
    return x + np.stack([_mixture(row, layer.moe, repeat, cfg, masked) for row in h])


def _attention(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    T, N, K, H = len(h), cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    qkv = (h @ _f64(layer.qkv[repeat]).T).reshape(T, N + 2 * K, H)
    out = np.zeros((T, N, H))
    for n in range(N):
        q = _rotate(qkv[:, n], cfg.rope_base)
        k = _rotate(qkv[:, N + n * K // N], cfg.rope_base)
        v = qkv[:, N + K + n * K // N]
        scores = q @ k.T / np.sqrt(H)
        scores[np.triu_indices(T, 1)] = -np.inf
        out[:, n] = _softmax(scores) @ v
    return out.reshape(T, N * H) @ _f64(layer.out[repeat]).T


def _mixture(row: np.ndarray, moe: MoE, repeat: int, cfg: ModelConfig, masked: Collection[int]) -> np.ndarray:
    scores = _f64(moe.router[repeat]) @ row + _f64(moe.bias[repeat])
    scores[list(masked)] = -np.inf
    chosen = np.argsort(-scores, kind="stable")[: cfg.moe.experts_per_token]
    gates = _softmax(scores[chosen]) if cfg.moe.gate == "softmax" else np.ones(len(chosen))
    out = np.zeros_like(row) if moe.shared is None else _feed_forward(row, moe.shared, (repeat,))
    for gate, expert in zip(gates, chosen, strict=True):
        out = out + gate * _feed_forward(row, moe.experts, (repeat, int(expert)))
    return out


def _feed_forward(h: np.ndarray, weights: FeedForward, at: tuple[int, ...]) -> np.ndarray:
    gate, up = np.split(h @ _f64(weights.gate_up[at]).T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ _f64(weights.down[at]).T


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * _f64(scale)


def _rotate(x: np.ndarray, base: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _f64(a: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float64)
