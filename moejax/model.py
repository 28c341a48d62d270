"""One rank's part of one step: embed, layers, head, sample. Runs inside `shard_map` over the ranks.

    tokens -> embed -> [ norm -> attention over pages and new tokens -> + ] per layer -> norm -> head -> sample
                       [ norm -> dense FFN, or route -> dispatch -> experts -> combine -> + ]

It reads the cache and never donates it: a step that fails leaves no trace. Layers of one pattern are scanned.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from moejax.attention import paged_attention
from moejax.cache import Cache
from moejax.config import ModelConfig
from moejax.exchange import Exchange, combine, dispatch, place
from moejax.experts import apply_experts
from moejax.inputs import TILE, Bucket, StepInputs
from moejax.layers import rms_norm, rope, row_dot, swiglu
from moejax.params import FeedForward, Layer, MoE, Params
from moejax.router import route
from moejax.sampling import sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """Everything static about a step: what is compiled once per value of this."""

    cfg: ModelConfig
    bucket: Bucket
    ranks: int
    slots: int
    page_size: int


@struct.dataclass
class StepOutputs:
    """Next tokens `[Z]`, their log-probabilities `[Z]`, new keys and values `[L, 2, R, K*H]`, and how many
    rows went to each expert `[moe layers, E]`."""

    tokens: Any
    logprobs: Any
    new_kv: Any
    expert_load: Any


def step(params: Params, cache: Cache, expert_to_slot: jax.Array, inputs: StepInputs, shape: StepShape) -> StepOutputs:
    """One step of one rank. `expert_to_slot [moe layers, E]` is this rank's row of the plan: the physical slot
    it sends each expert's tokens to, -1 where the expert is masked. Expert leaves of `params` hold slots."""
    cfg = shape.cfg
    with jax.named_scope("embed"):
        x = params.embed[inputs.tokens]
    new_kv, loads = [], []
    depth = moe_depth = 0
    for segment, (pattern, repeats) in zip(params.segments, cfg.segments, strict=True):
        experts = tuple(layer.moe.experts if layer.moe else None for layer in segment)
        scanned = tuple(layer.replace(moe=layer.moe.replace(experts=None)) if layer.moe else layer for layer in segment)
        moe_in_pattern = pattern.count("moe")
        these = slice(moe_depth, moe_depth + repeats * moe_in_pattern)
        routes = expert_to_slot[these].reshape(repeats, moe_in_pattern, expert_to_slot.shape[1])

        def body(x, at, experts=experts, first=depth, pattern=pattern):
            layers, routes, repeat = at
            kvs, counts = [], []
            for j, layer in enumerate(layers):
                index = first + repeat * len(pattern) + j
                x, kv = _attend(x, layer, cache, index, inputs, shape)
                if layer.moe is None:
                    x = x + swiglu(rms_norm(x, layer.ffn_norm, cfg.norm_eps), layer.ffn.gate_up, layer.ffn.down)
                else:
                    x, count = _route_and_mix(x, layer, experts[j], routes[len(counts)], repeat, inputs, shape)
                    counts.append(count)
                kvs.append(kv)
            return x, (jnp.stack(kvs), jnp.stack(counts) if counts else None)

        x, (kv, count) = lax.scan(body, x, (scanned, routes, jnp.arange(repeats)))
        new_kv.append(kv.reshape(-1, *kv.shape[2:]))
        if count is not None:
            loads.append(count.reshape(-1, count.shape[-1]))
        depth += repeats * len(pattern)
        moe_depth += repeats * moe_in_pattern
    with jax.named_scope("head"):
        last = rms_norm(x[inputs.sample_row], params.final_norm, cfg.norm_eps)
        logits = row_dot(last, params.embed if params.head is None else params.head)
    with jax.named_scope("sample"):
        tokens, logprobs = sample(logits, inputs)
    load = jnp.concatenate(loads) if loads else jnp.zeros((0, 0), jnp.int32)
    return StepOutputs(tokens=tokens, logprobs=logprobs, new_kv=jnp.concatenate(new_kv), expert_load=load)


def _attend(
    x: jax.Array, layer: Layer, cache: Cache, index: jax.Array, inputs: StepInputs, shape: StepShape
) -> tuple[jax.Array, jax.Array]:
    """x plus attention, and the layer's new keys and values `[2, R, K*H]`."""
    cfg, bucket = shape.cfg, shape.bucket
    R, N, K, H = bucket.rows, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    with jax.named_scope("attention"):
        qkv = row_dot(rms_norm(x, layer.attention_norm, cfg.norm_eps), layer.qkv).reshape(R, N + 2 * K, H)
        positions = jnp.maximum(inputs.positions, 0)
        qk = rope(qkv[:, : N + K], positions, cfg.rope_base)
        q, k, v = qk[:, :N], qk[:, N:], qkv[:, N + K :]
        out = []
        for first_z, first_r, Z, Q in (
            (0, 0, bucket.decode, 1),
            (bucket.decode, bucket.decode, bucket.tiles, TILE),
        ):
            if Z:
                segments, rows = slice(first_z, first_z + Z), slice(first_r, first_r + Z * Q)
                mixed = paged_attention(
                    q[rows].reshape(Z, Q, N, H),
                    k,
                    v,
                    cache,
                    index,
                    inputs.page_table[segments],
                    inputs.cached[segments],
                    inputs.new_base[segments],
                    inputs.positions[rows].reshape(Z, Q),
                    shape.page_size,
                )
                out.append(mixed.reshape(Z * Q, N * H))
        x = x + row_dot(jnp.concatenate(out), layer.out)
    return x, jnp.stack([k.reshape(R, K * H), v.reshape(R, K * H)])


def _route_and_mix(
    x: jax.Array,
    layer: Layer,
    experts: FeedForward,
    route_E: jax.Array,
    repeat: jax.Array,
    inputs: StepInputs,
    shape: StepShape,
) -> tuple[jax.Array, jax.Array]:
    """x plus the gated experts, and the rows sent to each expert `[E]`. Padding rows go nowhere."""
    cfg, moe = shape.cfg, layer.moe
    assert cfg.moe is not None
    assert isinstance(moe, MoE)
    exchange = Exchange(ranks=shape.ranks, slots=shape.slots, experts_per_token=cfg.moe.experts_per_token)
    h = rms_norm(x, layer.ffn_norm, cfg.norm_eps)
    with jax.named_scope("route"):
        chosen_TX, gates_TX = route(h, moe.router, moe.bias, route_E >= 0, cfg.moe)
        real_T1 = inputs.positions[:, None] >= 0
        slot_TX = jnp.where(real_T1, route_E[chosen_TX], -1)
        load_E = ((chosen_TX[..., None] == jnp.arange(cfg.moe.experts)) & real_T1[..., None]).sum((0, 1))
        rank_TX, nth_TX = place(slot_TX, exchange)
    with jax.named_scope("dispatch"):
        rows, wanted = dispatch(h, slot_TX, rank_TX, nth_TX, exchange)
    with jax.named_scope("experts"):
        answers = apply_experts(rows, wanted, experts, repeat, shape.slots)
    with jax.named_scope("combine"):
        mixed = combine(answers, rank_TX, nth_TX, gates_TX, exchange)
    if moe.shared is not None:
        with jax.named_scope("shared"):
            mixed = mixed + swiglu(h, moe.shared.gate_up, moe.shared.down)
    return x + mixed, load_E
