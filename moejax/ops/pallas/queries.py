"""Inputs of attention kernels, prepared: queries grouped by the key/value head that they read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.axes import ArrayLike


class GroupedQueries(NamedTuple):
    """Queries grouped by key/value head, `rows [Z, K, rows, H]`, and the `position [Z, rows]` of each, -1 for
    padding."""

    rows: Float[ArrayLike, "Z K rows H"]
    position: Int[ArrayLike, "Z rows"]
    of_segment: int
    """Rows of a head that are queries, the others being padding."""

    @classmethod
    def of(cls, inputs: AttentionInputs, rows: int) -> "GroupedQueries":
        """Scale the queries, and group them by key/value head, each padded to `rows`."""
        (Z, Q, N, H), K = inputs.q.shape, inputs.kv_heads
        G = N // K
        scaled = (inputs.q * inputs.scale).reshape(Z, Q, K, G, H)
        by_head = scaled.transpose(0, 2, 1, 3, 4).reshape(Z, K, Q * G, H)
        position = jnp.repeat(inputs.positions, G, axis=1)
        more = rows - Q * G
        return cls(
            jnp.pad(by_head, ((0, 0), (0, 0), (0, more), (0, 0))),
            jnp.pad(position, ((0, 0), (0, more)), constant_values=-1),
            Q * G,
        )

    def outputs(self, out_ZKRH: Float[ArrayLike, "Z K R H"], queries: int) -> Float[jax.Array, "Z Q N H"]:
        """The outputs of the rows in the order of the queries."""
        Z, K, _, H = out_ZKRH.shape
        out = out_ZKRH[:, :, : self.of_segment].reshape(Z, K, queries, -1, H)
        return out.transpose(0, 2, 1, 3, 4).reshape(Z, queries, -1, H)
