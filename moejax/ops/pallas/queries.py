"""Queries laid by the key/value head that they read, padded to the rows that a kernel multiplies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Queries(NamedTuple):
    """`rows [Z, K, rows, H]`, those of one key/value head together; `position [Z, rows]` of each, -1 if none."""

    rows: jax.Array
    position: jax.Array
    of_segment: int
    """How many of the rows of a head are queries: those of each position together."""

    @classmethod
    def of(cls, q_ZQNH: jax.Array, positions_ZQ: jax.Array, heads: int, rows: int) -> "Queries":
        """Of `heads` key/value heads, in so many rows."""
        Z, Q, N, H = q_ZQNH.shape
        G = N // heads
        by_head = q_ZQNH.reshape(Z, Q, heads, G, H).transpose(0, 2, 1, 3, 4).reshape(Z, heads, Q * G, H)
        position = jnp.repeat(positions_ZQ, G, axis=1)
        more = rows - Q * G
        return cls(
            jnp.pad(by_head, ((0, 0), (0, 0), (0, more), (0, 0))),
            jnp.pad(position, ((0, 0), (0, more)), constant_values=-1),
            Q * G,
        )

    def outputs(self, out_ZKRH: jax.Array, queries: int) -> jax.Array:
        """What came out for each row, as `[Z, Q, N, H]` again."""
        Z, K, _, H = out_ZKRH.shape
        out = out_ZKRH[:, :, : self.of_segment].reshape(Z, K, queries, -1, H)
        return out.transpose(0, 2, 1, 3, 4).reshape(Z, queries, -1, H)
