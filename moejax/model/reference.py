"""The whole model on one device, written for reading: for training, calibration, and as oracle of the served model.

No mesh, no pages, no slots: every token of every sequence at once, experts in logical order. Attention sums in another
order than paged attention: results agree with the served model up to rounding, not bit for bit.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Bool, Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.config_values import ConfigError
from moejax.config.layer_states import state_shapes
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.params import Layer, MoE, Params
from moejax.config.step_inputs import Bucket, idle_inputs, unpack
from moejax.model.experts import apply_expert
from moejax.model.feed_forward import (
    LayerEnd,
    PartRows,
    add_expert_outputs,
    add_residual,
    finish_feed_forward,
    finish_layer,
    shared_expert,
)
from moejax.model.indexer import best_positions, index_scores
from moejax.model.layers import feed_forward_of, norm, row_dot
from moejax.model.logits import head_logits
from moejax.model.projections import finish_attention, project_heads, project_qkv, score_scale
from moejax.model.router import route
from moejax.model.state_layers import mix_states
from planner.plan.step_layout import TILE


@struct.dataclass
class Routing:
    """The choices of the routers: experts `[L, B*T, X]`, and the balance loss of each MoE layer `[L]`."""

    chosen: jax.Array
    balance: jax.Array


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: Int[ArrayLike, "B T"],
    *,
    alive_LE: Bool[ArrayLike, "L E"] | None = None,
    capacity: int | None = None,
) -> tuple[Float[jax.Array, "B T V"], Routing]:
    """Logits `[B, T, V]` of the next token at every position, and the routing.

    `alive_LE` is False for masked experts of each MoE layer (none by default). `capacity` bounds the tokens
    an expert computes, to train faster: with None each expert computes all, and nothing is ever left out.
    Raises ConfigError for a model whose dense layers are sharded.
    """
    if cfg.shard_dense:
        raise ConfigError(f"the dense layers of {cfg.name} are sharded; give the model from which it was made.")
    B, T = tokens_BT.shape
    x_BTD, routing = hidden_states(params, cfg, tokens_BT, alive_LE=alive_LE, capacity=capacity)
    return head_logits(params.logits, x_BTD.reshape(B * T, -1)).reshape(B, T, -1), routing


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: Int[ArrayLike, "B T"],
    *,
    alive_LE: Bool[ArrayLike, "L E"] | None = None,
    capacity: int | None = None,
) -> tuple[Float[jax.Array, "B T D"], Routing]:
    """The rows that the head takes, and the routing; arguments as for `forward`."""
    B, T = tokens_BT.shape
    if alive_LE is None:
        alive_LE = jnp.ones((cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 1), bool)
    x_BTD = params.embed[tokens_BT] * cfg.embed_scale
    routings, first, depth = [], 0, 0
    for (pattern, repeats), layers in zip(cfg.main_segments, params.segments, strict=False):
        routed = pattern.count("moe")
        alive_RLE = alive_LE[first : first + repeats * routed].reshape(repeats, routed, alive_LE.shape[1])
        first += repeats * routed
        body = partial(_pattern, [cfg.of_layer(depth + j) for j in range(len(pattern))], pattern, capacity)
        depths_RL = depth + jnp.arange(repeats * len(pattern)).reshape(repeats, len(pattern))
        depth += repeats * len(pattern)
        x_BTD, routing = lax.scan(body, x_BTD, (layers, alive_RLE, depths_RL))
        if routed:
            routings.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), routing))
    x_BTD = norm(x_BTD, params.final_norm, params.final_norm_bias, cfg.norm_eps) * cfg.logit_scale
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *routings) if routings else None
    return x_BTD, joined or Routing(jnp.zeros((0, B * T, 1), jnp.int32), jnp.zeros((0,)))


def draft_logits(
    params: Params,
    cfg: ModelConfig,
    hidden_BTD: Float[ArrayLike, "B T D"],
    follow_BT: Int[ArrayLike, "B T"],
    *,
    capacity: int | None = None,
) -> tuple[Float[jax.Array, "B T V"], Routing | None]:
    """Logits of the token after the next by the layer of multi-token prediction (`moejax.model.mtp`), from the rows
    that the head takes and the token that follows each, and the layer's routing."""
    B, T, D = hidden_BTD.shape
    mtp, pattern = params.mtp, cfg.layer_kinds[-1:]
    assert mtp is not None
    embedded = norm(params.embed[follow_BT] * cfg.embed_scale, mtp.token_norm, None, cfg.norm_eps)
    hidden = norm(hidden_BTD, mtp.hidden_norm, None, cfg.norm_eps)
    rows = jnp.concatenate([embedded, hidden], axis=-1).reshape(B * T, -1)
    x_BTD = row_dot(rows, mtp.project).reshape(B, T, D)
    layers = jax.tree.map(lambda leaf: leaf[0], params.segments[-1])
    alive_LE = jnp.ones((1, cfg.moe.experts if cfg.moe else 1), bool)
    x_BTD, routing = _pattern([cfg], pattern, capacity, x_BTD, (layers, alive_LE, jnp.array([cfg.n_layers])))
    x_TD = norm(x_BTD, mtp.norm, None, cfg.norm_eps).reshape(B * T, D)
    return head_logits(params.logits, x_TD).reshape(B, T, -1), routing


def _pattern(
    of_layers: list[ModelConfig],
    pattern: tuple[str, ...],
    capacity: int | None,
    x_BTD: Float[ArrayLike, "B T D"],
    step: tuple,
) -> tuple[jax.Array, Routing | None]:
    layers, alive_LE, depths_L = step
    routings = []
    for j, (cfg, kind, layer) in enumerate(zip(of_layers, pattern, layers, strict=True)):
        h_BTD = norm(x_BTD, layer.attention_norm, layer.attention_norm_bias, cfg.norm_eps)
        mixed_BTD = recurrence(layer, cfg, h_BTD) if layer.has_state else attention(layer, cfg, h_BTD, depths_L[j])
        x_BTD = x_BTD + cfg.residual_scale * mixed_BTD
        if kind == "bare":
            continue
        x_TD = x_BTD.reshape(-1, cfg.d_model)
        rows = PartRows.of(x_TD, layer, cfg)
        if kind == "dense":
            limit = cfg.moe.dense_limit if cfg.moe else None
            y_TD = feed_forward_of(rows.experts, layer.ffn.gate_up, layer.ffn.down, cfg.activation, limit=limit)
            x_TD = add_residual(x_TD, finish_feed_forward(y_TD, layer.ffn_post_norm, cfg), cfg)
            x_BTD = finish_layer(x_TD, layer.scale).reshape(x_BTD.shape)
            continue
        assert cfg.moe is not None
        y_TD, routing = mixture(layer.moe, cfg.moe, rows, alive_LE[len(routings)], capacity)
        routings.append(routing)
        shared_TD = shared_expert(rows.shared, layer, "moe", cfg)
        x_BTD = add_expert_outputs(x_TD, y_TD, shared_TD, LayerEnd.of(layer), cfg).reshape(x_BTD.shape)
    return x_BTD, jax.tree.map(lambda *a: jnp.stack(a), *routings) if routings else None


def attention(
    layer: Layer, cfg: ModelConfig, x_BTD: Float[ArrayLike, "B T D"], index: Int[ArrayLike, ""]
) -> Float[jax.Array, "B T D"]:
    """Causal grouped-query attention (arXiv 2305.13245) of layer `index` over whole sequences that start at position 0,
    of which each position sees the last ones that its window holds."""
    B, T, D = x_BTD.shape
    q, k, v, indexed = project_qkv(x_BTD.reshape(B * T, D), layer, index, jnp.tile(jnp.arange(T), B), cfg)
    if cfg.latent is not None:
        k = jnp.concatenate([v, k], axis=-1)[..., : q.shape[-1]]
    N, K = q.shape[1], k.shape[1]
    q_BTKGH = q.reshape(B, T, K, N // K, -1)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k.reshape(B, T, K, -1)) * score_scale(cfg)
    seen = jnp.tril(jnp.ones((T, T), bool))
    if cfg.window is not None:
        window = jnp.array([each or T for each in cfg.windows])[index]
        first_T = jnp.arange(T) // window * window if cfg.chunked else jnp.arange(T) - window + 1
        seen &= jnp.arange(T) >= first_T[:, None]
    if indexed is not None and cfg.indexer is not None:
        by_sequence = (each.reshape(B, T, *each.shape[1:]) for each in indexed)
        best_BTS = best_positions(index_scores(*by_sequence), jnp.tile(jnp.arange(T), (B, 1)), cfg.indexer.chosen)
        seen = (seen & best_BTS)[:, None, None]
    scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
    if layer.sinks is not None:
        sinks = jnp.broadcast_to(layer.sinks.reshape(K, N // K, 1, 1), (B, K, N // K, T, 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :T].astype(x_BTD.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v.reshape(B, T, K, -1))
    out_TD = project_heads(mixed.reshape(B * T, N, -1), x_BTD.reshape(B * T, D), layer, cfg)
    return finish_attention(out_TD, layer, cfg).reshape(B, T, D)


def recurrence(layer: Layer, cfg: ModelConfig, x_BTD: Float[ArrayLike, "B T D"]) -> Float[jax.Array, "B T D"]:
    """The delta net or short convolution of a layer over whole sequences that start at position 0: each a chunk of
    tiles of its own."""
    T = x_BTD.shape[1]
    bucket = Bucket(decode=0, tiles=-(-T // TILE), max_pages=1, states=True)
    empty = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), state_shapes(cfg, 1))
    padded = jnp.pad(x_BTD, ((0, 0), (0, bucket.rows - T), (0, 0)))
    inputs = unpack(jnp.asarray(idle_inputs(bucket)), bucket)
    inputs = dataclasses.replace(
        inputs,
        positions=jnp.where(jnp.arange(bucket.rows) < T, jnp.arange(bucket.rows), -1),
        new_base=jnp.zeros_like(inputs.new_base),
    )
    outs = [mix_states(each, layer, empty, jnp.int32(0), inputs, bucket, cfg)[0][:T] for each in padded]
    return jnp.stack(outs)


def mixture(
    moe: MoE, cfg: MoEConfig, rows: PartRows, alive_E: Bool[ArrayLike, " E"], capacity: int | None = None
) -> tuple[Float[jax.Array, "T D"], Routing]:
    """The sum of the routed experts, and the router's choices (chosen `[T, X]`, balance a scalar).

    The balance loss is Switch Transformer's (arXiv 2101.03961, eq. 4): E times the sum over experts of the
    share of choices and the mean probability; 1 when all are used alike.
    """
    T, x_TD = len(rows.experts), rows.experts
    chosen_TX, gates_TX = route(rows.router, moe.router, moe.bias, alive_E, cfg, moe.expert_scale)
    picked_TXE = jax.nn.one_hot(chosen_TX, cfg.experts, dtype=x_TD.dtype)
    gates_TE = jnp.einsum("tx,txe->te", gates_TX, picked_TXE)
    probability_TE = jax.nn.softmax(row_dot(rows.router, moe.router) + moe.bias, axis=-1)
    if moe.latent_in is not None:
        x_TD = row_dot(x_TD, moe.latent_in)
    y_TD = jnp.zeros_like(x_TD)
    for e in range(cfg.experts):
        weights = jax.tree.map(lambda leaf, e=e: leaf[e], moe.experts)
        if cfg.gate == "input_sigmoid":
            y_TD = y_TD + apply_expert(gates_TE[:, e, None] * x_TD, weights, cfg)
        elif capacity is None or capacity >= T:
            y_TD = y_TD + gates_TE[:, e, None] * apply_expert(x_TD, weights, cfg)
        else:
            first = jnp.argsort(gates_TE[:, e] == 0, stable=True)[:capacity]
            part = apply_expert(x_TD[first], weights, cfg)
            y_TD = y_TD.at[first].add(gates_TE[first, e, None] * part)
    if moe.latent_out is not None:
        y_TD = row_dot(y_TD, moe.latent_out)
    share_E = picked_TXE.mean((0, 1))
    return y_TD, Routing(chosen_TX, cfg.experts * jnp.sum(share_E * probability_TE.mean(0)))


def next_token_losses(
    logits_BTV: Float[ArrayLike, "B T V"], targets_BT: Int[ArrayLike, "B T"]
) -> Float[jax.Array, "B T"]:
    """Negative log-likelihood of each target, in nats `[B, T]`."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    right = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - right


@partial(jax.jit, static_argnames=("cfg",))
def logits(
    params: Params, cfg: ModelConfig, tokens_BT: Int[ArrayLike, "B T"], alive_LE: Bool[ArrayLike, "L E"] | None = None
) -> Float[jax.Array, "B T V"]:
    """`forward` compiled, logits `[B, T, V]` only."""
    return forward(params, cfg, tokens_BT, alive_LE=alive_LE)[0]


@partial(jax.jit, static_argnames=("cfg",))
def losses(
    params: Params, cfg: ModelConfig, tokens_BS: Int[ArrayLike, "B S"], alive_LE: Bool[ArrayLike, "L E"] | None = None
) -> Float[jax.Array, "B rest"]:
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
