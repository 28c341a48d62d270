"""The experts of one rank: each slot's weights are read once, for the rows that want it and no others.

On a CPU, a loop of two-dimensional dots over tiles of rows sorted by slot; `lax.ragged_dot` is dense there and
multiplies every row with every expert (jax-facts).
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.layers import swiglu
from moejax.params import FeedForward

TILE = 32
"""Most rows a slot multiplies at a time."""


def apply_experts(
    rows_rD: jax.Array, wanted_rA: jax.Array, experts: FeedForward, repeat: jax.Array, slots: int
) -> jax.Array:
    """Answers `[r, A, D]` of the local slots `wanted [r, A]` (-1 for none, answered by zeros).

    `experts` leaves are `[R, S, ...]` of a whole segment; `repeat` picks the layer, so that no layer's
    weights are copied out.
    """
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
        y = swiglu(rows_rD[item // A], experts.gate_up[repeat, slot], experts.down[repeat, slot])
        return answers.at[jnp.where(inside, item, r * A)].set(y, mode="drop")

    answers = lax.fori_loop(0, end_tile_S[-1], one_tile, jnp.zeros((r * A, D), rows_rD.dtype))
    return answers.reshape(r, A, D)
