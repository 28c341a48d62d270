"""The whole model on one device, written for reading: training, calibration, oracle of the sharded one.

No mesh, no pages, no slots: every token of every sequence at once, experts in logical order. Attention sums
in another order than the paged one: the numbers agree with the served model up to rounding, not bit for bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from moejax.config import ModelConfig, MoEConfig
from moejax.layers import rms_norm, rope, row_dot, swiglu
from moejax.params import Layer, MoE, Params
from moejax.router import route


@struct.dataclass
class Routing:
    """What the routers did: experts chosen `[L, B*T, X]`, and the balance loss of each MoE layer `[L]`."""

    chosen: jax.Array
    balance: jax.Array


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    *,
    alive_LE: jax.Array | None = None,
    capacity: int | None = None,
) -> tuple[jax.Array, Routing]:
    """Logits `[B, T, V]` of the next token at every position, and the routing.

    `alive_LE` is False for masked experts of each MoE layer (none by default). `capacity` bounds the tokens
    an expert computes, to train faster: with None each expert computes all, and nothing is ever left out.
    """
    B, T = tokens_BT.shape
    if alive_LE is None:
        alive_LE = jnp.ones((cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 1), bool)
    x_BTD = params.embed[tokens_BT]
    routings, first = [], 0
    for (pattern, repeats), layers in zip(cfg.segments, params.segments, strict=True):
        routed = pattern.count("moe")
        alive_RLE = alive_LE[first : first + repeats * routed].reshape(repeats, routed, alive_LE.shape[1])
        first += repeats * routed
        body = partial(_pattern, cfg, pattern, capacity)
        x_BTD, routing = lax.scan(body, x_BTD, (layers, alive_RLE))
        if routed:
            routings.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), routing))
    x_BTD = rms_norm(x_BTD, params.final_norm, cfg.norm_eps)
    head_VD = params.embed if params.head is None else params.head
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *routings) if routings else None
    logits_BTV = row_dot(x_BTD.reshape(B * T, -1), head_VD).reshape(B, T, -1)
    return logits_BTV, joined or Routing(jnp.zeros((0, B * T, 1), jnp.int32), jnp.zeros((0,)))


def _pattern(
    cfg: ModelConfig, pattern: tuple[str, ...], capacity: int | None, x_BTD: jax.Array, step: tuple
) -> tuple[jax.Array, Routing | None]:
    layers, alive_LE = step
    routings = []
    for kind, layer in zip(pattern, layers, strict=True):
        x_BTD = x_BTD + attention(layer, cfg, rms_norm(x_BTD, layer.attention_norm, cfg.norm_eps))
        h_TD = rms_norm(x_BTD, layer.ffn_norm, cfg.norm_eps).reshape(-1, cfg.d_model)
        if kind == "dense":
            y_TD = swiglu(h_TD, layer.ffn.gate_up, layer.ffn.down)
        else:
            assert cfg.moe is not None
            y_TD, routing = mixture(layer.moe, cfg.moe, h_TD, alive_LE[len(routings)], capacity)
            routings.append(routing)
        x_BTD = x_BTD + y_TD.reshape(x_BTD.shape)
    return x_BTD, jax.tree.map(lambda *a: jnp.stack(a), *routings) if routings else None


def attention(layer: Layer, cfg: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """Causal grouped-query attention (arXiv 2305.13245) over whole sequences that start at position 0."""
    B, T, D = x_BTD.shape
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    heads = row_dot(x_BTD.reshape(B * T, D), layer.qkv).reshape(B * T, N + 2 * K, H)
    q, k, v = jnp.split(heads, (N, N + K), axis=1)
    positions = jnp.tile(jnp.arange(T), B)
    q_BTKGH = rope(q, positions, cfg.rope_base).reshape(B, T, K, N // K, H)
    k_BSKH = rope(k, positions, cfg.rope_base).reshape(B, T, K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * H**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(x_BTD.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v.reshape(B, T, K, H))
    return row_dot(mixed.reshape(B * T, N * H), layer.out).reshape(B, T, D)


def mixture(
    moe: MoE, cfg: MoEConfig, x_TD: jax.Array, alive_E: jax.Array, capacity: int | None = None
) -> tuple[jax.Array, Routing]:
    """The routed feed-forward of `x_TD`, and what the router did (chosen `[T, X]`, balance a scalar).

    The balance loss is Switch Transformer's (arXiv 2101.03961, eq. 4): E times the sum over experts of the
    share of choices and the mean probability; 1 when all are used alike.
    """
    T = len(x_TD)
    chosen_TX, gates_TX = route(x_TD, moe.router, moe.bias, alive_E, cfg)
    picked_TXE = jax.nn.one_hot(chosen_TX, cfg.experts, dtype=x_TD.dtype)
    gates_TE = jnp.einsum("tx,txe->te", gates_TX, picked_TXE)
    shared, experts = moe.shared, moe.experts
    y_TD = jnp.zeros_like(x_TD) if shared is None else swiglu(x_TD, shared.gate_up, shared.down)
    for e in range(cfg.experts):
        if capacity is None or capacity >= T:
            y_TD = y_TD + gates_TE[:, e, None] * swiglu(x_TD, experts.gate_up[e], experts.down[e])
        else:
            rows = jnp.argsort(gates_TE[:, e] == 0, stable=True)[:capacity]
            part = swiglu(x_TD[rows], experts.gate_up[e], experts.down[e])
            y_TD = y_TD.at[rows].add(gates_TE[rows, e, None] * part)
    probability_TE = jax.nn.softmax(row_dot(x_TD, moe.router) + moe.bias, axis=-1)
    share_E = picked_TXE.mean((0, 1))
    return y_TD, Routing(chosen_TX, cfg.experts * jnp.sum(share_E * probability_TE.mean(0)))


def next_token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, in nats `[B, T]`."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    right = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - right


@partial(jax.jit, static_argnames=("cfg",))
def logits(params: Params, cfg: ModelConfig, tokens_BT: jax.Array, alive_LE: jax.Array | None = None) -> jax.Array:
    """`forward` compiled, logits `[B, T, V]` only."""
    return forward(params, cfg, tokens_BT, alive_LE=alive_LE)[0]


@partial(jax.jit, static_argnames=("cfg",))
def losses(params: Params, cfg: ModelConfig, tokens_BS: jax.Array, alive_LE: jax.Array | None = None) -> jax.Array:
    """Nats of tokens 1..S-1 of each sequence, given those before `[B, S-1]`."""
    out = forward(params, cfg, tokens_BS[:, :-1], alive_LE=alive_LE)[0]
    return next_token_losses(out, tokens_BS[:, 1:])


def greedy(params: Params, cfg: ModelConfig, prompt: list[int], n: int) -> list[int]:
    """The `n` most likely next tokens, a whole forward pass each; the sequence is padded, for one compile."""
    tokens = np.zeros((1, len(prompt) + n), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + n):
        tokens[0, end] = int(jnp.argmax(logits(params, cfg, tokens)[0, end - 1]))
    return tokens[0, len(prompt) :].tolist()
