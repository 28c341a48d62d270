"""Rows sorted by the slot that they want, so that the rows of a slot lie together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike


class GroupedRows(NamedTuple):
    """Rows in the order of their slots, the rows of each slot, and the place of every answer."""

    rows: Float[ArrayLike, "P D"]
    size_S: Int[ArrayLike, " S"]
    place: Int[ArrayLike, "r A"]
    """P for no answer."""

    def answers(self, sorted_PD: Float[ArrayLike, "P D"]) -> Float[jax.Array, "r A D"]:
        """The answers in the order of the rows; zeros for none."""
        return sorted_PD.at[self.place].get(mode="fill", fill_value=0)


def group_by_slot(
    rows_rD: Float[ArrayLike, "r D"], wanted_rA: Int[ArrayLike, "r A"], slots: int, *, whole: int, places: int
) -> GroupedRows:
    """Sort rows by slot, each row once for every slot that it wants (-1 for none), into `places`. The rows of each slot
    begin at a multiple of `whole`."""
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
    return GroupedRows(rows, size_S, place_i.reshape(r, A))
