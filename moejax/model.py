"""One rank's part of one step: embed and layers. Runs inside `shard_map` over the ranks; head and sampling follow
on each rank alone (`steps.run_sample`).

    tokens -> embed -> [ norm -> attention over pages and new tokens -> + ] per layer -> norm
                       [ norm -> dense FFN, or route -> dispatch -> experts -> combine -> + ]

It reads the cache and never donates it: a step that fails leaves no trace. Layers of one pattern are scanned.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from moejax.attention import paged_attention
from moejax.cache import Cache
from moejax.config import LayerKind, ModelConfig, in_slots
from moejax.exchange import Exchange, combine, dispatch, place
from moejax.experts import always_on, apply_experts
from moejax.heads import biased, make_heads, score_scale, some_heads
from moejax.inputs import TILE, Bucket, StepInputs
from moejax.layers import Stacked, norm, swiglu
from moejax.params import Layer, MoE, Params
from moejax.precision import Int8, look_up
from moejax.router import route
from moejax.tensor import Group, sound_in_group, swap

Among = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
UNSEEN = 2**30
"""A window that no context reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """Everything static about a step: what is compiled once per value of this."""

    cfg: ModelConfig
    bucket: Bucket
    ranks: int
    slots: int
    page_size: int
    shared: bool = False
    """The exchange goes through memory that the ranks share."""

    @property
    def exchange(self) -> Exchange:
        """Sizes of the largest of its exchanges."""
        if self.cfg.moe is None:
            return Exchange(ranks=self.ranks, slots=self.slots, experts_per_token=1, shared=self.shared)
        return self.exchange_of("divided" if self.cfg.divide_dense else "moe")

    def exchange_of(self, kind: LayerKind) -> Exchange:
        """Sizes of the exchanges of layers of a kind that has experts in slots."""
        chosen = self.cfg.experts_of(kind).experts_per_token
        return Exchange(ranks=self.ranks, slots=self.slots, experts_per_token=chosen, shared=self.shared)


@struct.dataclass
class StepOutputs:
    """The rows after the last norm `[R, D]` (see `marked`), new keys and values (a Cache of `[L, R, width]`), and how
    many rows went to each expert `[moe layers, E]`. Of a rank in a tensor group, new keys and values are of the rows of
    all its members, one after the other, and `written` is what says where they go, packed; else that is None."""

    hidden: Any
    new_kv: Any
    expert_load: Any
    written: Any = None


def step(
    params: Params,
    cache: Cache,
    expert_to_slot: jax.Array,
    inputs: StepInputs,
    shape: StepShape,
    group: Group | None = None,
) -> StepOutputs:
    """One step of one rank. `expert_to_slot [moe layers, E]` is this rank's row of the plan: the physical slot
    it sends each expert's tokens to, -1 where the expert is masked. Expert leaves of `params` hold slots; its head
    is not used. `group` is there if the heads are divided (`ModelConfig.tensor`)."""
    cfg = shape.cfg
    x = embed(params, inputs, cfg)
    new_kv, loads = [], []
    depth = moe_depth = 0
    for segment, (pattern, repeats) in zip(params.segments, cfg.segments, strict=True):
        moe_in_pattern = sum(map(in_slots, pattern))
        these = slice(moe_depth, moe_depth + repeats * moe_in_pattern)
        routes = expert_to_slot[these].reshape(repeats, moe_in_pattern, expert_to_slot.shape[1])

        def body(x, at, segment=segment, first=depth, pattern=pattern):
            routes, repeat = at
            kvs, counts = [], []
            for j, stacked in enumerate(segment):
                layer = layer_at(stacked, repeat)
                index = first + repeat * len(pattern) + j
                x, kv = attend(x, layer, cache, index, inputs, shape, group=group)
                wanted = answered(inputs, index, cfg)
                if layer.moe is None:
                    x = feed_forward(x, layer, wanted, cfg)
                else:
                    x, count = _route_and_mix(x, layer, pattern[j], routes[len(counts)], wanted, shape)
                    counts.append(count)
                kvs.append(kv)
            return x, (jax.tree.map(lambda *rows: jnp.stack(rows), *kvs), jnp.stack(counts) if counts else None)

        x, (kv, count) = lax.scan(body, x, (routes, jnp.arange(repeats)))
        new_kv.append(jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), kv))
        if count is not None:
            loads.append(count.reshape(-1, count.shape[-1]))
        depth += repeats * len(pattern)
        moe_depth += repeats * moe_in_pattern
    hidden = last_norm(x, params, cfg)
    new = jax.tree.map(lambda *layers: jnp.concatenate(layers), *new_kv)
    load = jnp.concatenate(loads) if loads else jnp.zeros((0, 0), jnp.int32)
    sound, written = is_sound(new), None
    if group is not None:
        sound, written = sound_in_group(sound, group, shape.exchange), group.packed
    return StepOutputs(hidden=marked(hidden, sound, inputs), new_kv=new, expert_load=load, written=written)


def embed(params: Params, inputs: StepInputs, cfg: ModelConfig) -> jax.Array:
    """Rows `[R, D]` of tokens. Padding rows are zero and stay so through every layer without biases; the CPU kernels
    pass over such rows."""
    with jax.named_scope("embed"):
        x = jnp.where(inputs.positions[:, None] >= 0, look_up(params.embed, inputs.tokens), 0)
        return x if cfg.embed_scale == 1.0 else x * cfg.embed_scale


def answered(inputs: StepInputs, index: jax.Array, cfg: ModelConfig) -> StepInputs:
    """The inputs for what follows a layer's keys and values. Of the last layer the cache needs nothing else, so that
    rows whose hidden state nobody reads are padding from there on."""
    wanted = (index < cfg.n_layers - 1) | (inputs.read > 0)
    return inputs.replace(positions=jnp.where(wanted, inputs.positions, -1))


def is_sound(new_kv: Cache) -> jax.Array:
    """Of which rows the last layer's new keys and values are numbers, bool `[R]`."""
    return jnp.isfinite(new_kv.k[-1]).all(-1) & jnp.isfinite(new_kv.v[-1]).all(-1)


def marked(hidden: jax.Array, sound_R: jax.Array, inputs: StepInputs) -> jax.Array:
    """Hidden rows `[R, D]` that are read; of the others zeros, or not-a-number where something that the last layer made
    of them is no number, so that it is noticed before it is in the cache."""
    sound = jnp.isfinite(hidden).all(-1) & sound_R
    return jnp.where(inputs.read[:, None] > 0, hidden, jnp.where(sound, 0.0, jnp.nan)[:, None])


def last_norm(x: jax.Array, params: Params, cfg: ModelConfig) -> jax.Array:
    """Rows `[R, D]` as the head wants them."""
    hidden = norm(x, params.final_norm, params.final_norm_bias, cfg.norm_eps)
    return hidden if cfg.logit_scale == 1.0 else hidden * cfg.logit_scale


def layer_at(layer: Layer, repeat: jax.Array) -> Layer:
    """One layer of a segment: vectors are read, matrices stay in their stack."""
    is_int8 = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    read = lambda leaf: not is_int8(leaf) and leaf.ndim == 2  # noqa: E731
    return jax.tree.map(lambda leaf: leaf[repeat] if read(leaf) else Stacked(leaf, (repeat,)), layer, is_leaf=is_int8)


def attend(
    x: jax.Array,
    layer: Layer,
    cache: Cache,
    index: jax.Array,
    inputs: StepInputs,
    shape: StepShape,
    among: Among | None = None,
    group: Group | None = None,
) -> tuple[jax.Array, Cache]:
    """x plus attention, and the layer's new keys and values `[R, width]`. Where x is a part of the step's rows, `among`
    puts its keys and values among those of the others, which `inputs.new_base` counts. In a tensor group the new keys
    and values are those of all its rows."""
    cfg = shape.cfg
    with jax.named_scope("attention"):
        h = norm(x, layer.attention_norm, layer.attention_norm_bias, cfg.norm_eps)
        if group is None:
            out, kv = _own_heads(h, layer, cache, index, inputs, shape, among)
        else:
            out, kv = _heads_of_group(h, layer, cache, index, shape, group)
        return _add(x, biased(out, layer), cfg), kv


def _heads_of_group(
    h: jax.Array, layer: Layer, cache: Cache, index: jax.Array, shape: StepShape, group: Group
) -> tuple[jax.Array, Cache]:
    """What all heads add to this rank's rows, and new keys and values of this rank's heads for the rows of all members
    of the group `[T * R, width]`."""
    members = len(group.inputs)
    pages = cache.k.shape[1] // members // shape.page_size
    rows = swap(jnp.broadcast_to(h, (members, *h.shape)), group.mates, shape.exchange)
    outs, kvs = [], []
    for t, inputs in enumerate(group.inputs):
        there = inputs.replace(page_table=inputs.page_table + t * pages)
        out, kv = _own_heads(rows[t], layer, cache, index, there, shape)
        outs.append(out)
        kvs.append(kv)
    out, *others = swap(jnp.stack(outs), group.mates, shape.exchange)
    for other in others:
        out = out + other
    return out, jax.tree.map(lambda *each: jnp.concatenate(each), *kvs)


def _own_heads(
    h: jax.Array,
    layer: Layer,
    cache: Cache,
    index: jax.Array,
    inputs: StepInputs,
    shape: StepShape,
    among: Among | None = None,
) -> tuple[jax.Array, Cache]:
    """What this rank's heads add to normed rows `[R, D]`, and their new keys and values `[R, width]`."""
    cfg, bucket = shape.cfg, shape.bucket
    wanted = answered(inputs, index, cfg)
    q, k, v = make_heads(h, layer, jnp.maximum(inputs.positions, 0), cfg)
    if among is not None:
        k, v = among(k, v)
    window = None
    if cfg.window is not None:
        window = jnp.array([w or UNSEEN for w in cfg.windows])[index]
    out = []
    for first_z, first_r, Z, Q in (
        (0, 0, bucket.decode, 1),
        (bucket.decode, bucket.decode, bucket.tiles, TILE),
    ):
        if Z:
            segments, rows = slice(first_z, first_z + Z), slice(first_r, first_r + Z * Q)
            mixed = paged_attention(
                q[rows].reshape(Z, Q, *q.shape[1:]),
                k,
                v,
                cache,
                index,
                inputs.page_table[segments],
                inputs.cached[segments],
                inputs.new_base[segments],
                wanted.positions[rows].reshape(Z, Q),
                shape.page_size,
                scale=score_scale(cfg),
                window=window,
                sinks_N=layer.sinks,
                latent=cfg.latent is not None,
            )
            out.append(mixed.reshape(Z * Q, *mixed.shape[2:]))
    added = some_heads(jnp.concatenate(out), layer, cfg)
    return added, Cache(k=k.reshape(len(k), -1), v=v.reshape(len(v), -1))


def feed_forward(x: jax.Array, layer: Layer, inputs: StepInputs, cfg: ModelConfig) -> jax.Array:
    """x plus the dense feed-forward part of a layer."""
    h = _normed(x, layer, inputs, cfg)
    return _add(x, swiglu(h, layer.ffn.gate_up, layer.ffn.down), cfg)


def _normed(x: jax.Array, layer: Layer, inputs: StepInputs, cfg: ModelConfig) -> jax.Array:
    """Rows as the feed-forward part takes them; padding is zero."""
    h = norm(x, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)
    return jnp.where(inputs.positions[:, None] >= 0, h, 0)


def _add(x: jax.Array, y: jax.Array, cfg: ModelConfig) -> jax.Array:
    return x + y if cfg.residual_scale == 1.0 else x + cfg.residual_scale * y


def _route_and_mix(
    x: jax.Array,
    layer: Layer,
    kind: LayerKind,
    route_E: jax.Array,
    inputs: StepInputs,
    shape: StepShape,
) -> tuple[jax.Array, jax.Array]:
    """x plus the gated experts, and the rows sent to each expert `[E]`. Padding rows go nowhere."""
    exchange, moe = shape.exchange_of(kind), shape.cfg.experts_of(kind)
    sent = choose(x, layer, route_E, inputs, exchange, shape.cfg)
    with jax.named_scope("dispatch"):
        rows, wanted = dispatch(sent.h, sent.slot, sent.rank, sent.nth, exchange)
    with jax.named_scope("experts"):
        answers = apply_experts(rows, wanted, layer.moe.experts, shape.slots, moe)
    with jax.named_scope("combine"):
        mixed = combine(answers, sent.rank, sent.nth, sent.gates, exchange)
    return mix(x, mixed, always(sent.h, layer), shape.cfg), sent.load


@struct.dataclass
class Chosen:
    """Rows `h [T, D]` on their way to experts: physical slot, rank, and which answer from there it is `[T, X]` of each,
    the gates `[T, X]`, and the rows sent to each expert `[E]`."""

    h: Any
    slot: Any
    rank: Any
    nth: Any
    gates: Any
    load: Any


def choose(
    x: jax.Array, layer: Layer, route_E: jax.Array, inputs: StepInputs, exchange: Exchange, cfg: ModelConfig
) -> Chosen:
    """Norm and router; rows of a divided layer go to all its shards. `route_E` is the physical slot this rank uses of
    each expert, -1 where it is masked."""
    moe, experts = layer.moe, route_E.shape[0]
    assert isinstance(moe, MoE)
    h = _normed(x, layer, inputs, cfg)
    with jax.named_scope("route"):
        if moe.router is None:
            chosen_TX = jnp.broadcast_to(jnp.arange(experts), (len(h), experts))
            gates_TX = jnp.ones(chosen_TX.shape, jnp.float32)
        else:
            chosen_TX, gates_TX = route(h, moe.router, moe.bias, route_E >= 0, cfg.experts_of("moe"))
        real_T1 = inputs.positions[:, None] >= 0
        slot_TX = jnp.where(real_T1, route_E[chosen_TX], -1)
        load_E = ((chosen_TX[..., None] == jnp.arange(experts)) & real_T1[..., None]).sum((0, 1))
        rank_TX, nth_TX = place(slot_TX, exchange)
    return Chosen(h=h, slot=slot_TX, rank=rank_TX, nth=nth_TX, gates=gates_TX, load=load_E)


def always(h: jax.Array, layer: Layer) -> jax.Array | None:
    """Answers `[T, D]` of the always-on expert, if there is one."""
    if layer.moe.shared is None:
        return None
    with jax.named_scope("shared"):
        return always_on(h, layer.moe)


def mix(x: jax.Array, experts_TD: jax.Array, always_TD: jax.Array | None, cfg: ModelConfig) -> jax.Array:
    """x plus what its experts answered."""
    return _add(x, experts_TD if always_TD is None else experts_TD + always_TD, cfg)
