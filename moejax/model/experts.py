"""The experts of one rank. The weights of each slot are read once, for the rows that want it and no others."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.eight_bit import EightBit
from moejax.config.int4 import Int4
from moejax.config.moe_config import MoEConfig
from moejax.config.params import FeedForward, MoE
from moejax.config.weight_formats import StackSlice
from moejax.model.layers import (
    Dot,
    biased_swiglu,
    feed_forward_of,
    ordered_sum,
    read_weight,
    row_dot,
    row_dot_reference,
)
from moejax.ops import cpu

_MAX_TILE = 32
"""Most rows that one slot multiplies at a time."""


def apply_experts(
    rows_rD: Float[ArrayLike, "r D"], wanted_rA: Int[ArrayLike, "r A"], experts: FeedForward, slots: int, moe: MoEConfig
) -> Float[ArrayLike, "r A D"]:
    """The answers of the local slots that each row wants (-1 for none, answered by zeros).

    `experts` leaves are `StackSlice` `[P, ...]` of a layer, so that no layer's weights are copied out.
    """
    packed = cpu.active() and isinstance(experts.down.stack, (EightBit, Int4))  # multiplied where they lie, not widened
    dot = row_dot if packed else row_dot_reference
    reference = functools.partial(apply_experts_reference, experts=experts, slots=slots, moe=moe, dot=dot)
    if moe.expert_bias or moe.expert_limit is not None:
        return reference(rows_rD, wanted_rA)
    if cpu.active():
        (layer,) = experts.down.index
        answers = cpu.experts(rows_rD, wanted_rA, experts.gate_up.stack, experts.down.stack, layer, moe.activation)
        return answers.astype(rows_rD.dtype)
    if moe.activation != "swiglu":
        return reference(rows_rD, wanted_rA)
    from moejax.ops.pallas import gpu, tpu  # not at import: a rank on a CPU does without and starts 0.25 s sooner

    kernels = {
        platform: functools.partial(each.experts, gate_up=experts.gate_up, down=experts.down, slots=slots)
        for platform, each in (("cuda", gpu), ("tpu", tpu))
        if each.supports_experts(experts.gate_up, experts.down)
    }
    answers = lax.platform_dependent(rows_rD, wanted_rA, default=reference, **kernels)
    return answers.astype(rows_rD.dtype)


def apply_experts_reference(
    rows_rD: Float[ArrayLike, "r D"],
    wanted_rA: Int[ArrayLike, "r A"],
    experts: FeedForward,
    slots: int,
    moe: MoEConfig,
    dot: Dot = row_dot_reference,
) -> Float[ArrayLike, "r A D"]:
    """`apply_experts` by XLA: a loop of two-dimensional dots over tiles of rows sorted by slot. (`lax.ragged_dot` is
    dense on a CPU and multiplies every row with every expert.)"""
    r, A = wanted_rA.shape
    D = rows_rD.shape[1]
    tile = min(_MAX_TILE, max(2, r))
    item_slot = wanted_rA.reshape(-1)
    item_slot = jnp.where(item_slot >= 0, item_slot, slots)
    order = jnp.argsort(item_slot)
    count_S = (item_slot[:, None] == jnp.arange(slots)).sum(0)
    start_S = jnp.cumsum(count_S) - count_S
    tiles_S = (count_S + tile - 1) // tile
    end_tile_S = jnp.cumsum(tiles_S)

    def one_tile(i, answers):
        slot = jnp.minimum((i >= end_tile_S).sum(), slots - 1)
        first = start_S[slot] + (i - (end_tile_S[slot] - tiles_S[slot])) * tile
        at = first + jnp.arange(tile)
        inside = at < start_S[slot] + count_S[slot]
        item = order[jnp.minimum(at, r * A - 1)]
        weights = jax.tree.map(lambda leaf: leaf.at(slot), experts, is_leaf=lambda leaf: isinstance(leaf, StackSlice))
        y = apply_expert(rows_rD[item // A], weights, moe, dot)
        return answers.at[jnp.where(inside, item, r * A)].set(y, mode="drop")

    answers = lax.fori_loop(0, end_tile_S[-1], one_tile, jnp.zeros((r * A, D), rows_rD.dtype))
    return answers.reshape(r, A, D)


def apply_expert(
    rows_rD: Float[ArrayLike, "r D"], weights: FeedForward, moe: MoEConfig, dot: Dot = row_dot
) -> Float[ArrayLike, "r D"]:
    """The answers of one expert to all rows. `weights` are arrays or slices of that expert alone."""
    if not moe.expert_bias:
        return feed_forward_of(rows_rD, weights.gate_up, weights.down, moe.activation, dot, moe.expert_limit)
    biases = read_weight(weights.gate_up_bias), read_weight(weights.down_bias)
    return biased_swiglu(rows_rD, weights.gate_up, weights.down, *biases, moe.swiglu_limit, moe.swiglu_alpha, dot)


def apply_shared_expert(h_TD: Float[ArrayLike, "T D"], moe: MoE, cfg: MoEConfig) -> Float[ArrayLike, "T D"]:
    """The outputs of the shared expert of a routed layer, weighted by its own gate if it has one."""
    assert moe.shared is not None
    y_TD = feed_forward_of(h_TD, moe.shared.gate_up, moe.shared.down, cfg.activation, limit=cfg.dense_limit)
    if moe.shared_gate is None:
        return y_TD
    return jax.nn.sigmoid(ordered_sum(h_TD * read_weight(moe.shared_gate)))[:, None] * y_TD
