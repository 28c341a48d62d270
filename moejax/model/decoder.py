"""One rank's part of one step: embed and layers. Runs inside `shard_map` over the ranks; head and sampling follow
on each rank alone (`steps.run_sample`).

    tokens -> embed -> [ norm -> attention over pages and new tokens, or a mix with a state -> + ] per layer -> norm
                       [ norm -> dense FFN, or route -> dispatch -> experts -> combine -> + ]

The step reads the cache and never donates it: a step that fails leaves no trace. Layers of one pattern are scanned.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Bool, Float, Int

from moejax.config.attention_inputs import AttentionInputs, IndexInputs
from moejax.config.axes import ArrayLike
from moejax.config.kv_cache import KVCache, from_cache_format, to_cache_format
from moejax.config.layer_states import LayerStates
from moejax.config.model_config import ModelConfig, in_slots
from moejax.config.params import Layer, Params
from moejax.config.step_inputs import Bucket, StepInputs
from moejax.config.weight_formats import StackSlice, is_scaled, look_up
from moejax.model.attention import paged_attention
from moejax.model.feed_forward import add_residual, feed_forward, routed_feed_forward
from moejax.model.indexer import IndexRows
from moejax.model.layers import norm
from moejax.model.projections import finish_attention, project_heads, project_qkv, score_scale
from moejax.model.state_layers import finite_states, mix_states
from moejax.model.step_shape import StepShape
from moejax.model.tensor_parallel import TensorGroup, finite_in_group, group_all_to_all
from planner.plan.step_layout import TILE

MergeKV = Callable[[KVCache], KVCache]
"""Puts the keys and values `[T, width]` of a micro-batch among those of the whole step `[R, width]`."""
NO_WINDOW = 2**30
"""A window that no context reaches."""


@struct.dataclass
class StepOutputs:
    """The outputs of one rank's part of a step. Leaves are arrays or partition specs."""

    hidden: Any
    """Rows after the last norm `[R, D]`; see `tag_nonfinite`."""
    new_kv: Any
    """New keys and values, and new states of segments: KVCache of `[L, R, width]`, `[L, Z, ...]`. On a rank of a tensor
    group those of the rows of all members, one member after the other."""
    expert_load: Any
    """Rows sent to each expert `[moe layers, E]`."""
    group_inputs: Any = None
    """Packed inputs of all members of a tensor group, which say where the rows of `new_kv` are written; else None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """Everything that the attention of any layer reads besides rows and weights."""

    cache: KVCache
    inputs: StepInputs
    shape: StepShape
    merge_kv: MergeKV | None = None
    """Set where rows are those of a micro-batch: `inputs.new_base` counts the rows of the whole step."""
    group: TensorGroup | None = None
    """Set where heads are sharded over a tensor group (`ModelConfig.tensor`)."""


def step(
    params: Params,
    cache: KVCache,
    expert_to_slot: Int[ArrayLike, "moe E"],
    inputs: StepInputs,
    shape: StepShape,
    group: TensorGroup | None = None,
) -> StepOutputs:
    """One step of one rank.

    `expert_to_slot` is this rank's row of the plan: the physical slot to which it sends each expert's tokens, -1 where
    the expert is masked. Expert leaves of `params` hold slots; the head of `params` is not used.
    """
    cfg = shape.cfg
    context = StepContext(cache=cache, inputs=inputs, shape=shape, group=group)
    x_RD = embed(params, inputs, cfg)
    new_kv, new_states, loads = [], [], []
    depth = moe_depth = 0
    for segment, (pattern, repeats) in zip(params.segments, cfg.main_segments, strict=False):
        moe_in_pattern = sum(map(in_slots, pattern))
        these = slice(moe_depth, moe_depth + repeats * moe_in_pattern)
        routes = expert_to_slot[these].reshape(repeats, moe_in_pattern, expert_to_slot.shape[1])

        def body(x_RD, at, segment=segment, first=depth, pattern=pattern):
            routes, repeat = at
            kvs, states, counts = [], [], []
            for j, stacked in enumerate(segment):
                layer = layer_at(stacked, repeat)
                index, own = first + repeat * len(pattern) + j, cfg.of_layer(first + j)
                if layer.has_state:
                    x_RD, state = advance_states(x_RD, layer, index, context)
                    states.append(state)
                else:
                    x_RD, kv = attend(x_RD, layer, index, context, own)
                    kvs.append(kv)
                wanted = rows_needed(inputs, index, cfg)
                if layer.moe is None:
                    x_RD = feed_forward(x_RD, layer, wanted, own)
                else:
                    its = dataclasses.replace(shape, cfg=own)
                    x_RD, count = routed_feed_forward(x_RD, layer, pattern[j], routes[len(counts)], wanted, its)
                    counts.append(count)
            return x_RD, (_stacked(kvs), _stacked(states), jnp.stack(counts) if counts else None)

        x_RD, (kv, state, count) = lax.scan(body, x_RD, (routes, jnp.arange(repeats)))
        new_kv += [] if kv is None else [_by_layer(kv)]
        new_states += [] if state is None else [_by_layer(state)]
        if count is not None:
            loads.append(count.reshape(-1, count.shape[-1]))
        depth += repeats * len(pattern)
        moe_depth += repeats * moe_in_pattern
    hidden_RD = last_norm(x_RD, params, cfg)
    new = jax.tree.map(lambda *layers: jnp.concatenate(layers), *new_kv)
    if new_states:
        new = new.replace(states=jax.tree.map(lambda *layers: jnp.concatenate(layers), *new_states))
    load = jnp.concatenate(loads) if loads else jnp.zeros((0, 0), jnp.int32)
    finite_R, group_inputs = is_finite(new, shape.bucket), None
    if cfg.mtp:
        new, load = _with_idle_layer(new), load if cfg.moe is None else _with_idle_layer(load)
    if group is not None:
        finite_R, group_inputs = finite_in_group(finite_R, group, shape.exchange), group.packed
    return StepOutputs(
        hidden=tag_nonfinite(hidden_RD, finite_R, inputs, keep=cfg.mtp),
        new_kv=new,
        expert_load=load,
        group_inputs=group_inputs,
    )


def _with_idle_layer(of_layers: Any) -> Any:
    """The arrays `[L, ...]` with zeros for the layer that drafts: its entries and counts in a step without it."""
    return jax.tree.map(lambda each: jnp.concatenate([each, jnp.zeros_like(each[:1])]), of_layers)


def _stacked(layers: list[Any]) -> Any:
    """The outputs of the layers of a pattern, one above the other; None where there are none."""
    return jax.tree.map(lambda *each: jnp.stack(each), *layers) if layers else None


def _by_layer(repeats: Any) -> Any:
    """Leaves `[repeats, layers of a pattern, ...]` as `[L, ...]`."""
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), repeats)


def embed(params: Params, inputs: StepInputs, cfg: ModelConfig) -> Float[ArrayLike, "R D"]:
    """Embedding rows of the tokens. Rows of padding are zero and stay so through every layer without biases; the CPU
    kernels skip such rows."""
    with jax.named_scope("embed"):
        x_RD = jnp.where(inputs.positions[:, None] >= 0, look_up(params.embed, inputs.tokens), 0)
        return x_RD if cfg.embed_scale == 1.0 else x_RD * cfg.embed_scale


def rows_needed(inputs: StepInputs, index: Int[ArrayLike, ""], cfg: ModelConfig) -> StepInputs:
    """The inputs for what follows the keys and values of layer `index`.

    After the last layer's keys and values only rows that are sampled or scored are needed; the others become padding.
    With a layer of multi-token prediction, which takes every row of the main model, it is the last.
    """
    wanted_R = (index < cfg.depth - 1) | (inputs.read > 0)
    return dataclasses.replace(inputs, positions=jnp.where(wanted_R, inputs.positions, -1))


def is_finite(new_kv: KVCache, bucket: Bucket) -> Bool[ArrayLike, " R"]:
    """True for rows whose new keys and values in the last layer, and the new states of their segments, are all
    finite."""
    k, v = (from_cache_format(jax.tree.map(lambda a: a[-1], rows)) for rows in (new_kv.k, new_kv.v))
    finite_R = jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1)
    return finite_R if new_kv.states is None else finite_R & finite_states(new_kv.states, bucket)


def tag_nonfinite(
    hidden_RD: Float[ArrayLike, "R D"], finite_R: Bool[ArrayLike, " R"], inputs: StepInputs, *, keep: bool = False
) -> Float[ArrayLike, "R D"]:
    """The rows of `hidden` that are read; of the others zeros, or the rows with `keep`, and not-a-number where the row,
    or its keys or values in the last layer, are not finite. So the host notices before the step is committed to the
    cache."""
    finite_R = jnp.isfinite(hidden_RD).all(-1) & finite_R
    unread_RD = jnp.where(finite_R[:, None], hidden_RD if keep else 0.0, jnp.nan)
    return jnp.where(inputs.read[:, None] > 0, hidden_RD, unread_RD)


def last_norm(x_RD: Float[ArrayLike, "R D"], params: Params, cfg: ModelConfig) -> Float[ArrayLike, "R D"]:
    """The rows that the head takes."""
    hidden_RD = norm(x_RD, params.final_norm, params.final_norm_bias, cfg.norm_eps)
    return hidden_RD if cfg.logit_scale == 1.0 else hidden_RD * cfg.logit_scale


def layer_at(layer: Layer, repeat: Int[ArrayLike, ""]) -> Layer:
    """One layer of a segment: vectors are read, matrices stay in their stack."""

    def read(leaf: Any) -> Any:
        is_vector = not is_scaled(leaf) and leaf.ndim == 2
        return leaf[repeat] if is_vector else StackSlice(leaf, (repeat,))

    return jax.tree.map(read, layer, is_leaf=is_scaled)


def attend(
    x_TD: Float[ArrayLike, "T D"], layer: Layer, index: Int[ArrayLike, ""], context: StepContext, cfg: ModelConfig
) -> tuple[Float[ArrayLike, "T D"], KVCache]:
    """x plus attention, and the new keys and values `[R, width]` of layer `index`. `cfg` is the configuration as that
    layer sees it (`ModelConfig.of_layer`).

    R are the rows of the whole step; in a tensor group those of all its members.
    """
    with jax.named_scope("attention"):
        h_TD = norm(x_TD, layer.attention_norm, layer.attention_norm_bias, cfg.norm_eps)
        attend_normed = _attend_heads if context.group is None else _attend_in_group
        out_TD, kv = attend_normed(h_TD, layer, index, context, cfg)
        return add_residual(x_TD, finish_attention(out_TD, layer, cfg), cfg), kv


def advance_states(
    x_RD: Float[ArrayLike, "R D"], layer: Layer, index: Int[ArrayLike, ""], context: StepContext
) -> tuple[Float[ArrayLike, "R D"], LayerStates]:
    """x plus the delta net or short convolution of layer `index`, and the new states of all segments `[Z, ...]`."""
    cfg, states = context.shape.cfg, context.cache.states
    assert states is not None
    with jax.named_scope("state_layer"):
        h_RD = norm(x_RD, layer.attention_norm, None, cfg.norm_eps)
        depth = _place_among(cfg.state_layers, index, cfg)
        out_RD, new = mix_states(h_RD, layer, states, depth, context.inputs, context.shape.bucket, cfg)
        return add_residual(x_RD, out_RD, cfg), new


def _place_among(layers: tuple[int, ...], index: Int[ArrayLike, ""], cfg: ModelConfig) -> Int[ArrayLike, ""]:
    """The place of layer `index` among these layers."""
    return jnp.array([sum(each < i for each in layers) for i in range(cfg.n_layers)], jnp.int32)[index]


def _attend_in_group(
    h_TD: Float[ArrayLike, "T D"], layer: Layer, index: Int[ArrayLike, ""], context: StepContext, cfg: ModelConfig
) -> tuple[Float[ArrayLike, "T D"], KVCache]:
    """The sum of all heads' outputs for this rank's rows, and the new keys and values of this rank's heads for the rows
    of all members of the group `[members * T, width]`."""
    group, shape = context.group, context.shape
    assert group is not None
    members = len(group.inputs)
    pages = context.cache.entries // members // shape.page_size
    rows = group_all_to_all(jnp.broadcast_to(h_TD, (members, *h_TD.shape)), group.tp_peers, shape.exchange)
    outs, kvs = [], []
    for t, inputs in enumerate(group.inputs):
        member = dataclasses.replace(inputs, page_table=inputs.page_table + t * pages)
        out, kv = _attend_heads(rows[t], layer, index, dataclasses.replace(context, inputs=member), cfg)
        outs.append(out)
        kvs.append(kv)
    out, *others = group_all_to_all(jnp.stack(outs), group.tp_peers, shape.exchange)
    for other in others:
        out = out + other
    return out, jax.tree.map(lambda *each: jnp.concatenate(each), *kvs)


def _attend_heads(
    h_TD: Float[ArrayLike, "T D"], layer: Layer, index: Int[ArrayLike, ""], context: StepContext, cfg: ModelConfig
) -> tuple[Float[ArrayLike, "T D"], KVCache]:
    """The output of this rank's heads for normed rows, and their new keys and values `[R, width]`."""
    model, bucket, inputs = context.shape.cfg, context.shape.bucket, context.inputs
    depth = _place_among(cfg.attention_layers, index, cfg) if cfg.state_layers else index
    wanted = rows_needed(inputs, index, cfg)
    q, k, v, indexed = project_qkv(h_TD, layer, index, jnp.maximum(inputs.positions, 0), cfg)
    new = to_cache_format(model, k.reshape(len(k), -1), v.reshape(len(v), -1))
    if context.merge_kv is not None:
        new = context.merge_kv(new)
    window = chunk = None
    if cfg.window is not None:
        window = jnp.array([w or NO_WINDOW for w in cfg.windows])[index]
        window, chunk = (None, window) if cfg.chunked else (window, None)
    out = []
    for first_z, first_r, Z, Q in (
        (0, 0, bucket.decode, 1),
        (bucket.decode, bucket.decode, bucket.tiles, TILE),
    ):
        if Z:
            segments, rows = slice(first_z, first_z + Z), slice(first_r, first_r + Z * Q)
            mixed = paged_attention(
                AttentionInputs(
                    q=q[rows].reshape(Z, Q, *q.shape[1:]),
                    new=new,
                    cache=context.cache,
                    layer=depth,
                    page_table=inputs.page_table[segments],
                    cached=inputs.cached[segments],
                    new_base=inputs.new_base[segments],
                    positions=wanted.positions[rows].reshape(Z, Q),
                    window=window,
                    chunk=chunk,
                    sinks=layer.sinks,
                    kv_heads=k.shape[1],
                    page_size=context.shape.page_size,
                    scale=score_scale(cfg),
                    latent=cfg.latent is not None,
                    index=None if indexed is None else _index_inputs(indexed, rows, Z, cfg),
                    d_value=None if model.windowed is None and cfg.d_value is None else cfg.value_size,
                )
            )
            out.append(mixed.reshape(Z * Q, *mixed.shape[2:]))
    out_TD = project_heads(jnp.concatenate(out), h_TD, layer, cfg)
    return out_TD, new


def _index_inputs(indexed: IndexRows, rows: slice, Z: int, cfg: ModelConfig) -> IndexInputs:
    """The queries of the indexer of Z segments, which have these rows."""
    assert cfg.indexer is not None
    q, weights = (each[rows].reshape(Z, -1, *each.shape[1:]) for each in (indexed.q, indexed.weights))
    return IndexInputs(q=q, weights=weights, chosen=cfg.indexer.chosen)
