"""The experts of one rank: each slot's weights are read once, for the rows that want it and no others."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from moejax import kernels
from moejax.axes import Numbers
from moejax.config import MoEConfig
from moejax.layers import Dot, Stacked, biased_swiglu, ordered_sum, row_dot, row_dot_reference, swiglu, value
from moejax.params import FeedForward, MoE

TILE = 32
"""Most rows a slot multiplies at a time."""


def apply_experts(
    rows_rD: Float[Numbers, "r D"], wanted_rA: Int[Numbers, "r A"], experts: FeedForward, slots: int, moe: MoEConfig
) -> Float[Numbers, "r A D"]:
    """Answers `[r, A, D]` of the local slots `wanted [r, A]` (-1 for none, answered by zeros).

    `experts` leaves are `layers.Stacked` `[S, ...]` of a layer, so that no layer's weights are copied out.
    """
    reference = functools.partial(apply_experts_reference, experts=experts, slots=slots, moe=moe)
    if moe.expert_bias:
        return reference(rows_rD, wanted_rA)
    if kernels.active():
        (layer,) = experts.down.index
        answers = kernels.experts(rows_rD, wanted_rA, experts.gate_up.stack, experts.down.stack, layer)
        return answers.astype(rows_rD.dtype)
    from moejax.pallas import gpu, tpu  # a CPU's rank can do without: a quarter of a second of its start

    ways = {
        platform: functools.partial(each.experts, gate_up=experts.gate_up, down=experts.down, slots=slots)
        for platform, each in (("cuda", gpu), ("tpu", tpu))
        if each.takes_experts(experts.gate_up, experts.down)
    }
    answers = lax.platform_dependent(rows_rD, wanted_rA, default=reference, **ways)
    return answers.astype(rows_rD.dtype)


def apply_experts_reference(
    rows_rD: Float[Numbers, "r D"], wanted_rA: Int[Numbers, "r A"], experts: FeedForward, slots: int, moe: MoEConfig
) -> Float[Numbers, "r A D"]:
    """`apply_experts` by XLA: a loop of two-dimensional dots over tiles of rows sorted by slot. (`lax.ragged_dot` is
    dense on a CPU and multiplies every row with every expert.)"""
    r, A = wanted_rA.shape
    D = rows_rD.shape[1]
    tile = min(TILE, max(2, r))
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
        weights = jax.tree.map(lambda leaf: leaf.at(slot), experts, is_leaf=lambda leaf: isinstance(leaf, Stacked))
        y = one_expert(rows_rD[item // A], weights, moe, row_dot_reference)
        return answers.at[jnp.where(inside, item, r * A)].set(y, mode="drop")

    answers = lax.fori_loop(0, end_tile_S[-1], one_tile, jnp.zeros((r * A, D), rows_rD.dtype))
    return answers.reshape(r, A, D)


def one_expert(rows_rD: Numbers, weights: FeedForward, moe: MoEConfig, dot: Dot = row_dot) -> Numbers:
    """Answers `[r, D]` of one expert whose weights are those of no other."""
    if not moe.expert_bias:
        return swiglu(rows_rD, weights.gate_up, weights.down, dot)
    biases = value(weights.gate_up_bias), value(weights.down_bias)
    return biased_swiglu(rows_rD, weights.gate_up, weights.down, *biases, moe.swiglu_limit, moe.swiglu_alpha, dot)


def always_on(h_TD: Float[Numbers, "T D"], moe: MoE) -> Float[Numbers, "T D"]:
    """Answers `[T, D]` of the shared expert of a routed layer, weighed by its own gate if it has one."""
    y_TD = swiglu(h_TD, moe.shared.gate_up, moe.shared.down)
    if moe.shared_gate is None:
        return y_TD
    return jax.nn.sigmoid(ordered_sum(h_TD * value(moe.shared_gate)))[:, None] * y_TD
