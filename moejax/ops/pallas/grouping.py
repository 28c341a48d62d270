"""Rows sorted by the slot they want, so that each slot's weights are multiplied by rows that lie together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.axes import Numbers


class Sorted(NamedTuple):
    """`rows [P, D]`, those of one slot together, in the order of the slots; `size_S` of each slot, and the place of
    every answer `[r, A]`, P for none."""

    rows: jax.Array
    size_S: jax.Array
    place: jax.Array

    def answers(self, sorted_PD: jax.Array) -> jax.Array:
        """What came out for each place, `[r, A, D]`; zeros for none."""
        return sorted_PD.at[self.place].get(mode="fill", fill_value=0)


def by_slot(
    rows_rD: Float[Numbers, "r D"], wanted_rA: Int[Numbers, "r A"], slots: int, *, whole: int, places: int
) -> Sorted:
    """Each row as often as it wants a slot (-1 for none), in `places`; every slot's begin at a multiple of `whole`."""
    r, A = wanted_rA.shape
    slot_i = jnp.where(wanted_rA >= 0, wanted_rA, slots).reshape(-1)
    order = jnp.argsort(slot_i, stable=True)
    size_S = (slot_i[:, None] == jnp.arange(slots)).sum(0, dtype=jnp.int32)
    room_S = -(-size_S // whole) * whole
    first_S = jnp.cumsum(room_S) - room_S
    ahead_S = jnp.cumsum(size_S) - size_S
    slot_j = slot_i[order]
    at_j = (first_S - ahead_S)[jnp.minimum(slot_j, slots - 1)] + jnp.arange(r * A)
    place_i = jnp.zeros(r * A, jnp.int32).at[order].set(jnp.where(slot_j < slots, at_j, places))
    rows = (
        jnp.zeros((places, rows_rD.shape[1]), rows_rD.dtype)
        .at[place_i]
        .set(rows_rD[jnp.arange(r * A) // A], mode="drop")
    )
    return Sorted(rows, size_S, place_i.reshape(r, A))
